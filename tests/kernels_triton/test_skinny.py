"""Products of a few rows against their plain formulation: odd shapes, every variant, views as the layers pass them."""

from __future__ import annotations

import itertools

import pytest
import torch

from specserve_kernels.skinny.hopper import skinny_linear_hopper, takes
from specserve_kernels.skinny.linear import skinny_linear_ref, skinny_linear_triton
from specserve_kernels.tolerances import OP

VARIANTS = [(False, False, False), (True, False, False), (False, True, False), (False, True, True), (True, True, False)]


def made(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.25).to(device, dtype)


@pytest.mark.parametrize(("adds", "norms", "gated"), VARIANTS)
def test_one_row(adds: bool, norms: bool, gated: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    for dtype, (out_dim, in_dim) in itertools.product((torch.float32, torch.bfloat16), ((54, 272), (36, 1160))):
        x = made((3, in_dim + 8), dtype, device)[1:2, :in_dim]
        weight = made((out_dim, in_dim), dtype, device)
        residual = made((1, out_dim), dtype, device) if adds else None
        norm = (made((in_dim,), dtype, device), torch.tensor(1e-5, device=device)) if norms else None
        wide = [None if t is None else t.double() for t in (x, weight, residual)]
        wide_norm = None if norm is None else (norm[0].double(), norm[1].double())
        assert wide[0] is not None
        assert wide[1] is not None
        expected = skinny_linear_ref(wide[0], wide[1], wide[2], wide_norm, gated).to(dtype)
        got = skinny_linear_triton(x, weight, residual, norm, gated)
        assert residual is None or got is residual
        rtol, atol = OP[dtype]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rows", [2, 8, 13, 32, 64])
@pytest.mark.parametrize(("adds", "gated", "parted"), [(0, 0, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1)])
def test_some_rows_on_hopper(rows: int, adds: int, gated: int, parted: int, device: torch.device) -> None:
    x = made((rows + 2, 1168), torch.bfloat16, device)[1 : rows + 1, :1160]
    weight = made((456, 1160), torch.bfloat16, device)
    if not takes(x, weight):
        pytest.skip("needs a Hopper GPU")
    residual = made((rows, 456), torch.bfloat16, device) if adds else None
    arrivals = torch.zeros(64, dtype=torch.int32, device=device) if parted else None
    wide = None if residual is None else residual.double()
    expected = skinny_linear_ref(x.double(), weight.double(), wide, None, bool(gated)).to(x.dtype)
    got = [
        skinny_linear_hopper(x, weight, None if residual is None else residual.clone(), bool(gated), arrivals)
        for _ in range(2)
    ]
    assert torch.equal(*got)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got[0], expected, rtol=rtol, atol=atol)
    assert arrivals is None or not arrivals.any()
