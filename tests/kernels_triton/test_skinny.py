"""Products of a few rows against their plain formulation: odd shapes, every variant, views as the layers pass them."""

from __future__ import annotations

import itertools

import pytest
import torch

from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import GroupedLora, SlotFactors, grouped_lora
from specserve_kernels.norm import rms_norm_ref
from specserve_kernels.skinny.ahead import factors_ref, leave_ref
from specserve_kernels.skinny.hopper import choose_cut, skinny_linear_hopper, takes
from specserve_kernels.skinny.linear import (
    add_skinny_linear,
    skinny_linear,
    skinny_linear_ahead,
    skinny_linear_ref,
    skinny_linear_triton,
    takes_lora,
)
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


@pytest.mark.parametrize("rows", [2, 8, 13, 32, 64, 128])
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


def slots_of(
    ranks: list[int], widths: tuple[int, ...], in_dim: int, device: torch.device
) -> tuple[SlotFactors, torch.Tensor]:
    """Slots of those ranks, as loading leaves them: zeros from a rank to the next multiple of 16, then anything."""
    stride = (max(ranks) + 15) // 16 * 16
    a = made((len(ranks), len(widths), stride, in_dim), torch.bfloat16, device)
    b = made((len(ranks), stride, sum(widths)), torch.bfloat16, device)
    for slot, rank in enumerate(ranks):
        behind = (rank + 15) // 16 * 16
        for tensor in (a[slot].movedim(1, 0), b[slot]):
            tensor[rank:behind] = 0
            tensor[behind:] = torch.nan
    return SlotFactors(a.flatten(0, 2), b.flatten(0, 1), widths), torch.tensor(ranks, device=device)


def grouped(
    factors: SlotFactors, ranks: torch.Tensor, row_slots: torch.Tensor, row_weights: torch.Tensor
) -> GroupedLora:
    rows = torch.arange(len(row_slots), device=row_slots.device)
    return grouped_lora([factors], int(ranks.max()), ranks, rows, row_slots, row_weights)


@pytest.mark.parametrize("rows", [1, 2, 8, 13, 32, 64, 100])
@pytest.mark.parametrize("per_row", [1, 3])
@pytest.mark.parametrize(
    ("widths", "adds", "gated"), [((256, 64, 64), 0, 0), ((448,), 1, 0), ((192, 192), 0, 1), ((384,), 0, 1)]
)
def test_adapters_within_the_product_on_hopper(
    rows: int, per_row: int, widths: tuple[int, ...], adds: int, gated: int, device: torch.device
) -> None:
    """More adapters than the rings hold, ranks that fill no block, sums, rows without; then the same rows alone."""
    torch.manual_seed(3)
    x = made((rows, 2128), torch.bfloat16, device)[:, :2120]
    weight = made((sum(widths), 2120), torch.bfloat16, device)
    if not takes(x, weight):
        pytest.skip("needs a Hopper GPU")
    factors, ranks = slots_of([(7 * slot) % 41 for slot in range(40)], widths, 2120, device)
    residual = made((rows, sum(widths)), torch.bfloat16, device) if adds else None
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)
    row_slots = torch.randint(-1, 40, (rows, per_row), device=device)
    row_weights = torch.rand(rows, per_row, device=device)

    def product(named: torch.Tensor) -> torch.Tensor:
        assert takes_lora(x, weight, factors)
        lora = grouped(factors, ranks, named, row_weights).fold(0, x)
        mine = None if residual is None else residual.clone()
        return skinny_linear(x, weight, residual=mine, gated=bool(gated), arrivals=arrivals, lora=lora)

    got = product(row_slots)
    rtol, atol = OP[x.dtype]
    torch.testing.assert_close(got, expected(x, weight, residual, factors, ranks, row_slots, row_weights, gated),
                               rtol=rtol, atol=atol)  # fmt: skip
    assert not arrivals.any()
    for row in range(0, rows, 5):
        alone = torch.full_like(row_slots, -1)
        alone[row] = row_slots[row]
        assert torch.equal(product(alone)[row], got[row])
    base = None if residual is None else residual.clone()
    cut = choose_cut(rows, sum(widths) // (2 if gated else 1), 2120, bool(gated), adapters=True)
    base = skinny_linear_hopper(x, weight, base, bool(gated), arrivals, cut)
    assert torch.equal(product(torch.full_like(row_slots, -1)), base)


def expected(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, factors: SlotFactors, ranks: torch.Tensor,
    row_slots: torch.Tensor, row_weights: torch.Tensor, gated: int,
) -> torch.Tensor:  # fmt: skip
    """Product, then adapters, then what follows, in float64."""
    y = summed(x, weight, factors, ranks, row_slots, row_weights)
    y = gate_of(y) if gated else y
    return (y if residual is None else y + residual.double()).to(x.dtype)


def gate_of(y: torch.Tensor) -> torch.Tensor:
    gate, up = y.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def summed(
    x: torch.Tensor, weight: torch.Tensor, factors: SlotFactors, ranks: torch.Tensor, row_slots: torch.Tensor,
    row_weights: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x Wᵀ and what adapters add, float64; what x is shrunk to is rounded, as the kernel must."""
    y = x.double() @ weight.double().t()
    starts = [0, *itertools.accumulate(factors.widths)]
    stride, parts = factors.b.shape[0] // len(ranks), len(factors.widths)
    for row, slots in enumerate(row_slots.tolist()):
        for slot in {slot for slot in slots if slot >= 0 and ranks[slot] > 0}:
            share = row_weights[row][row_slots[row] == slot].sum().double()
            for part in range(parts):
                first, columns = (slot * parts + part) * stride, slice(starts[part], starts[part + 1])
                shrunk = factors.a[first : first + ranks[slot]].double() @ x[row].double() * share
                b = factors.b[slot * stride : slot * stride + ranks[slot], columns].double()
                y[row, columns] += shrunk.to(x.dtype).double() @ b
    return y


def test_adapters_are_added_apart_where_the_product_does_not_take_them(device: torch.device) -> None:
    """Neither float32 nor parts that end within a tile of columns."""
    for widths, dtype in (((192, 64), torch.float32), ((24, 40), torch.bfloat16)):
        factors, _ = slots_of([4, 16], widths, 64, device)
        factors = SlotFactors(factors.a.to(dtype), factors.b.to(dtype), factors.widths)
        assert not takes_lora(made((3, 64), dtype, device), made((sum(widths), 64), dtype, device), factors)


@pytest.mark.parametrize("rows", [1, 2, 8, 13, 40, 64])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(("gated", "parted"), [(False, True), (True, False), (False, False)])
def test_a_norm_between_two_products_on_hopper(
    rows: int, adapters: bool, gated: bool, parted: bool, device: torch.device
) -> None:
    """What the first leaves is what a norm of its result needs, and the second makes of it what the norm would have;
    with adapters in both or none, of a size that fills its tiles or not, by one program a tile or several."""
    torch.manual_seed(5)
    size, out = 1152 if adapters else 1160, 384
    x, residual = made((rows, 456), torch.bfloat16, device), 3 * made((rows, size), torch.bfloat16, device)
    first, second = made((size, 456), torch.bfloat16, device), made((out, size), torch.bfloat16, device)
    gain, eps = 1 + made((size,), torch.bfloat16, device), torch.tensor(1e-5, device=device)
    if not takes(x, first):
        pytest.skip("needs a Hopper GPU")
    arrivals = torch.zeros(64, dtype=torch.int32, device=device) if parted else None
    row_slots = torch.arange(rows, device=device)[:, None] % 5 - 1
    row_weights = torch.rand(rows, 1, device=device)
    widths = (out // 2,) * 2 if gated else (out,)
    of_first, of_second = (slots_of([8, 3, 16, 40], *sizes, device) for sizes in (((size,), 456), (widths, size)))

    def fold(given: tuple[SlotFactors, torch.Tensor], x: torch.Tensor) -> Folded | None:
        return grouped(*given, row_slots, row_weights).fold(0, x) if adapters else None

    h = residual.clone()
    ahead = add_skinny_linear(h, x, first, gain, arrivals=arrivals, lora=fold(of_first, x))
    plain = skinny_linear(x, first, residual=residual.clone(), arrivals=arrivals, lora=fold(of_first, x))
    if rows > 1 or adapters:  # one row alone takes another kernel
        assert torch.equal(h, plain) and (arrivals is None or not arrivals.any())
    left = leave_ref(h.double(), gain.double())
    rtol, atol = OP[torch.bfloat16]
    torch.testing.assert_close(ahead.scaled, left.scaled.to(h.dtype), rtol=rtol, atol=atol)
    torch.testing.assert_close(ahead.squares[:, :rows].double(), left.squares[:, :rows], rtol=1e-5, atol=1e-5)

    got, again = (
        skinny_linear_ahead(ahead, eps, second, gated=gated, arrivals=arrivals, lora=fold(of_second, ahead.scaled))
        for _ in range(2)
    )
    # What was left is rounded, as a norm's result is, and so is what it is shrunk to.
    none = torch.full_like(row_slots, -1)
    sums = summed(ahead.scaled, second, *of_second, row_slots if adapters else none, row_weights)
    sums *= factors_ref(left, eps.double())
    want = gate_of(sums) if gated else sums
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)
    assert torch.equal(got, again)


def test_what_is_left_for_a_norm_is_what_it_needs() -> None:
    """The references of skinny.ahead against the norm's own."""
    torch.manual_seed(6)
    h, gain, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 200), (200,), (24, 200)))
    ahead, eps = leave_ref(h, gain), torch.tensor(1e-5, dtype=torch.float64)
    assert ahead.squares.shape == (4, 8)
    got = (ahead.scaled @ weight.t()) * factors_ref(ahead, eps)
    torch.testing.assert_close(got, rms_norm_ref(h, gain, eps) @ weight.t(), rtol=1e-12, atol=1e-12)
