"""Weights in one byte each: how far codes are from what they stand for, and products of them against plain ones."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.norm import rms_norm_ref, sum_dtype
from specserve_kernels.skinny.codes import CODES, Coded, Kind, decode, empty_coded, encode
from specserve_kernels.skinny.quantised import int8_cpu, quantised_linear, suits_cpu
from specserve_kernels.tolerances import OP

KINDS: tuple[Kind, ...] = ("fp8", "int8")


def coded(kind: Kind, weight: torch.Tensor) -> Coded:
    into = empty_coded(kind, *weight.shape, weight.device)
    encode(weight, into)
    return into


def made(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_weight_is_further_from_its_code_than_the_format_allows(kind: Kind, dtype: torch.dtype) -> None:
    weight = (made(40, 300) * 10.0 ** torch.arange(-20, 20)[:, None] / 7).to(dtype)
    weight[3, 7] *= 50  # one large weight makes its row's scale large, and only its row's
    before = weight.clone()
    into = coded(kind, weight)
    assert torch.equal(weight, before)
    error = (decode(into, torch.float64) - weight.double()).abs()
    scales = into.scales.double()[:, None]
    # The largest may lie beyond the last code by what its scale was rounded: half a unit in bfloat16's last place.
    clipped = weight.double().abs() * 2**-8
    bound = scales / 2 if kind == "int8" else torch.maximum(weight.double().abs() / 16, scales / 1024)
    assert (error <= torch.maximum(bound, clipped) * (1 + 1e-6)).all()
    assert torch.equal(into.scales, into.scales.bfloat16().float())
    most = CODES[kind][1]
    assert (into.codes.float().abs().amax(1) > most * 0.98).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_one_and_rows_do_not_depend_on_others(kind: Kind) -> None:
    weight = made(6, 64)
    weight[2] = 0
    into = coded(kind, weight)
    assert decode(into, torch.float32)[2].eq(0).all()
    part = coded(kind, weight[3:5])
    assert torch.equal(part.codes.float(), into.codes[3:5].float())
    assert torch.equal(part.scales, into.scales[3:5])


def test_a_code_is_exact_in_every_dtype() -> None:
    every = torch.arange(-127, 128, dtype=torch.int8)
    bytes_ = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for codes in (every, bytes_[bytes_.float().isfinite()]):
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(codes.to(dtype).float(), codes.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("in_dim", [96, 75])
@pytest.mark.parametrize("variant", ["plain", "residual", "norm", "gated"])
def test_a_product_is_that_of_the_decoded_matrix(kind: Kind, rows: int, in_dim: int, variant: str) -> None:
    into = coded(kind, made(50, in_dim))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, residual = made(rows, in_dim).to(dtype), made(rows, 50).to(dtype) if variant == "residual" else None
        norm = (made(in_dim).to(dtype), torch.tensor(1e-5, dtype=sum_dtype(dtype))) if variant == "norm" else None
        wide = x.double() if norm is None else rms_norm_ref(x.double(), norm[0].double(), norm[1].double())
        expected = wide @ decode(into, torch.float64).t()
        if residual is not None:
            expected += residual.double()
        if variant == "gated":
            expected = torch.nn.functional.silu(expected[:, :25]) * expected[:, 25:]
        got = quantised_linear(x, into, residual=residual, norm=norm, gated=variant == "gated")
        assert residual is None or got is residual
        # Torch's weight-only product rounds to bfloat16 on the way.
        rtol, atol = OP[torch.bfloat16 if suits_cpu(x, into) else dtype]
        scale = 1.0 if dtype == torch.float64 else expected.abs().max().item()
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol * scale)


def test_torchs_product_gives_a_row_the_same_whatever_the_others_are() -> None:
    """A draft's passes and a target's verification have other numbers of rows."""
    into = coded("int8", made(70, 96))
    x = made(32, 96)
    whole = int8_cpu(x, into)
    for rows in (1, 3, 8, 17):
        assert torch.equal(int8_cpu(x[:rows], into), whole[:rows])
