"""Products of few rows with codes of one byte against the decoded matrix in float64: odd shapes, every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specserve.layers.quantised import QuantisedStorage
from specserve.layers.storage import DenseStorage
from specserve_kernels import dispatch
from specserve_kernels.language import tl, triton
from specserve_kernels.skinny.codes import Coded, Kind, decode_ref, decode_triton, empty_coded, encode
from specserve_kernels.skinny.linear import skinny_linear_ref
from specserve_kernels.skinny.quantised import quantised_one_row_triton
from specserve_kernels.skinny.quantised_rows import choose_cut, choose_words_cut, quantised_rows_triton
from specserve_kernels.skinny.quantised_words import widen
from specserve_kernels.tolerances import MODEL, OP

VARIANTS = [(False, False, False), (True, False, False), (False, True, False), (False, True, True), (True, True, False)]
KINDS: tuple[Kind, ...] = ("fp8", "int8")


def made(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.25).to(device, dtype)


def coded(kind: Kind, out_dim: int, in_dim: int, device: torch.device) -> Coded:
    into = empty_coded(kind, out_dim, in_dim, device)
    encode(made(out_dim, in_dim, dtype=torch.float32, device=device), into)
    return into


@pytest.mark.parametrize("kind", KINDS)
def test_decoding(kind: Kind, device: torch.device) -> None:
    weight = coded(kind, 37, 130, device)
    assert torch.equal(decode_triton(weight, torch.float32), decode_ref(weight, torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        rtol, atol = OP[dtype]
        torch.testing.assert_close(decode_triton(weight, dtype), decode_ref(weight, dtype), rtol=rtol, atol=atol)


@triton.jit
def _widen_kernel(words, out, SIZE: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + tl.arange(0, 4 * SIZE), tl.reshape(widen(tl.load(words + at), FP8, NATIVE), (4 * SIZE,)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_widened_exactly(kind: Kind, device: torch.device) -> None:
    codes = torch.arange(256, device=device).to(torch.uint8)
    out = torch.empty(256, dtype=torch.bfloat16, device=device)
    is_fp8 = kind == "fp8"
    _widen_kernel[(1,)](codes.view(torch.int32), out, SIZE=64, FP8=is_fp8, NATIVE=device.type == "cuda")
    expected = codes.view(torch.float8_e4m3fn if is_fp8 else torch.int8).double()
    finite = ~expected.isnan()  # two codes that no weight has
    assert torch.equal(out.double()[finite] * (2.0**120 if is_fp8 else 1), expected[finite])
    assert out.isfinite().all()  # what is read beyond a row's end is multiplied by zero


# rows, adds, norms, gated; out, in; tiles of W, tiles on their way, warps, parts along `in`
THROUGH_REGISTERS = [
    (1, 0, 1, 1, 76, 584, 16, 4, 2, 1), (1, 1, 0, 0, 40, 512, 32, 2, 4, 2), (1, 0, 1, 0, 40, 520, 16, 1, 2, 4),
    (7, 1, 0, 0, 76, 584, 32, 2, 2, 1), (16, 0, 0, 1, 40, 512, 16, 2, 2, 2), (37, 0, 0, 0, 76, 300, 64, 1, 2, 3),
    (70, 1, 0, 0, 40, 256, 32, 2, 2, 1),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", THROUGH_REGISTERS)
def test_codes_through_registers(kind: Kind, case: tuple[int, ...], device: torch.device) -> None:
    """Rows and columns that fill no tile, parts that get nothing, parts of full tiles, x and the residual as views."""
    torch.manual_seed(3)
    rows, adds, norms, gated, out_dim, in_dim, wide, ahead, warps, splits = case
    x = made(rows + 2, in_dim + 8, dtype=torch.bfloat16, device=device)[1 : rows + 1, :in_dim]
    weight = coded(kind, out_dim, in_dim, device)
    residual = made(rows, out_dim + 8, dtype=x.dtype, device=device)[:, :-8] if adds else None
    norm = (made(in_dim, dtype=x.dtype, device=device), torch.tensor(1e-5, device=device)) if norms else None
    wide_norm = None if norm is None else (norm[0].double(), norm[1].double())
    more = None if residual is None else residual.double()
    expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), more, wide_norm, bool(gated))
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)
    cut = {**choose_words_cut(rows, out_dim, in_dim, wide, ahead, warps), "SPLITS": splits}

    def run(first: int) -> torch.Tensor:
        mine = None if residual is None else residual[first:].clone()
        return quantised_rows_triton(x[first:], weight, mine, bool(gated), arrivals, cut, norm)

    got = run(0)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got, expected.to(x.dtype), rtol=rtol, atol=atol)
    assert not arrivals.any()
    assert torch.equal(run(0), got)
    if rows > 1:
        assert torch.equal(run(1), got[1:])  # a row does not depend on the others


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("adds", "norms", "gated"), VARIANTS)
def test_one_row(kind: Kind, dtype: torch.dtype, adds: bool, norms: bool, gated: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    for out_dim, in_dim in ((54, 272), (36, 1160)):
        x = made(3, in_dim + 8, dtype=dtype, device=device)[1:2, :in_dim]
        weight = coded(kind, out_dim, in_dim, device)
        residual = made(1, out_dim, dtype=dtype, device=device) if adds else None
        norm = (made(in_dim, dtype=dtype, device=device), torch.tensor(1e-5, device=device)) if norms else None
        wide_norm = None if norm is None else (norm[0].double(), norm[1].double())
        wide = None if residual is None else residual.double()
        expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), wide, wide_norm, gated)
        got = quantised_one_row_triton(x, weight, residual, norm, gated)
        assert residual is None or got is residual
        rtol, atol = OP[dtype]
        torch.testing.assert_close(got, expected.to(dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [2, 16, 37, 130])
@pytest.mark.parametrize(("adds", "gated", "splits"), [(0, 0, 1), (1, 0, 4), (0, 1, 1), (0, 1, 2), (0, 0, 8)])
def test_some_rows(kind: Kind, rows: int, adds: int, gated: int, splits: int, device: torch.device) -> None:
    """Rows and columns that fill no tile, parts that get nothing, x and the residual as views."""
    torch.manual_seed(2)
    x = made(rows + 2, 728, dtype=torch.bfloat16, device=device)[1 : rows + 1, :720]
    weight = coded(kind, 152, 720, device)
    residual = made(rows, 152, dtype=torch.bfloat16, device=device) if adds else None
    wide = None if residual is None else residual.double()
    expected = skinny_linear_ref(x.double(), decode_ref(weight, torch.float64), wide, None, bool(gated)).to(x.dtype)
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)
    cut = {**choose_cut(rows, 152, 720), "SPLITS": splits}

    def run(first: int) -> torch.Tensor:
        mine = None if residual is None else residual[first:].clone()
        return quantised_rows_triton(x[first:], weight, mine, bool(gated), arrivals, cut)

    got = run(0)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    assert not arrivals.any()
    assert torch.equal(run(0), got)
    assert torch.equal(run(1), got[1:])  # a row does not depend on the others


def test_float32(device: torch.device) -> None:
    x, weight = made(3, 96, dtype=torch.float32, device=device), coded("int8", 70, 96, device)
    expected = (x.double() @ decode_ref(weight, torch.float64).t()).float()
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(quantised_rows_triton(x, weight), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_storage_multiplies_as_a_plain_one_of_the_decoded_weights(
    kind: Kind, bias: bool, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way in which layers call it, through the kernels."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", dispatch.TRITON_DEVICES | {device.type})
    torch.manual_seed(4)
    dtype, widths = torch.bfloat16, (40, 40)
    settings: dict[str, Any] = {"bias": bias, "dtype": dtype, "device": device}
    quantised, plain = QuantisedStorage(kind, 144, widths, **settings), DenseStorage(144, widths, **settings)
    for coded_part, part in zip(quantised.parameters(), plain.parameters(), strict=True):
        weight = made(40, 144, dtype=torch.float32, device=device)
        coded_part["weight"].load(weight)
        codes, scales = coded_part["weight"].destination, coded_part["weight"].scales
        assert scales is not None
        part["weight"].load(decode_ref(Coded(codes, scales), torch.float32))
        if bias:
            values = made(40, dtype=dtype, device=device)
            coded_part["bias"].load(values)
            part["bias"].load(values)
    x, y = made(rows, 144, dtype=dtype, device=device), made(rows, 80, dtype=dtype, device=device)
    norm = (made(144, dtype=dtype, device=device), torch.tensor(1e-5, device=device))

    def results(storage: DenseStorage | QuantisedStorage) -> list[torch.Tensor]:
        onto = y.clone()
        storage.add_matmul(onto, x)
        return [storage.matmul(x), storage.matmul(x, norm), storage.matmul(x, norm, gated=True), onto]

    rtol, atol = MODEL[dtype]  # the plain weights are rounded once more
    for got, expected in zip(results(quantised), results(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
