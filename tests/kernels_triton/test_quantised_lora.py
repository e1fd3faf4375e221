"""Adapters within products of codes, against both in float64: mixed ranks, sums of several, rows without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from specserve.layers.quantised import QuantisedStorage
from specserve_kernels import dispatch
from specserve_kernels.activation import silu_mul_ref
from specserve_kernels.lora.grouped import GroupedLora, SlotFactors, grouped_lora
from specserve_kernels.skinny.codes import Coded, Kind, decode_ref, empty_coded, encode
from specserve_kernels.skinny.quantised_lora import choose_cut, choose_fold, fits, quantised_lora_triton
from specserve_kernels.skinny.quantised_rows import quantised_rows_triton
from specserve_kernels.tolerances import OP

RANKS = [0, 16, 5, 33, 64, 8, 40, 17]
"""Of eight slots, one of them empty."""
BF16 = torch.bfloat16
RTOL, ATOL = OP[BF16]


def made(*shape: int, device: torch.device) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.25).to(device, BF16)


def coded(kind: Kind, out_dim: int, in_dim: int, device: torch.device) -> Coded:
    into = empty_coded(kind, out_dim, in_dim, device)
    encode(made(out_dim, in_dim, device=device), into)
    return into


def slots_of(widths: tuple[int, ...], in_dim: int, device: torch.device) -> SlotFactors:
    """As loading leaves them: zeros from a rank to the next multiple of 16, then anything. B is small beside W, for the
    interpreter cuts off where it should round, s among others."""
    stride = max(RANKS)
    a = made(len(RANKS), len(widths), stride, in_dim, device=device)
    b = made(len(RANKS), stride, sum(widths), device=device) / 8
    for slot, rank in enumerate(RANKS):
        behind = (rank + 15) // 16 * 16
        for tensor in (a[slot].movedim(1, 0), b[slot]):
            tensor[rank:behind] = 0
            tensor[behind:] = torch.nan
    return SlotFactors(a.flatten(0, 2), b.flatten(0, 1), widths)


class Case(NamedTuple):
    """A product and the adapters of its rows."""

    x: torch.Tensor
    weight: Coded
    factors: SlotFactors
    residual: torch.Tensor | None
    gated: bool
    row_slots: torch.Tensor
    row_weights: torch.Tensor

    def adapters(self, row_slots: torch.Tensor, *, many: bool = False) -> GroupedLora:
        rows, ranks = torch.arange(len(row_slots), device=self.x.device), torch.tensor(RANKS, device=self.x.device)
        return grouped_lora([self.factors], max(RANKS), ranks, rows, row_slots, self.row_weights, many=many)

    def expected(self) -> torch.Tensor:
        """Product, then adapters, then what follows; what x is shrunk to is rounded, as the kernel must."""
        y = self.x.double() @ decode_ref(self.weight, torch.float64).t()
        a, b, widths = self.factors
        a, b = a.view(len(RANKS), len(widths), max(RANKS), -1).double(), b.view(len(RANKS), max(RANKS), -1).double()
        for row, slots in enumerate(self.row_slots.tolist()):
            for slot in {slot for slot in slots if slot >= 0}:
                share = self.row_weights[row][self.row_slots[row] == slot].sum().double()
                columns = iter(y[row].split(widths))
                for part, of_b in enumerate(b[slot, : RANKS[slot]].split(widths, dim=1)):
                    shrunk = a[slot, part, : RANKS[slot]] @ self.x[row].double() * share
                    next(columns).add_(shrunk.to(BF16).double() @ of_b)
        if self.gated:
            y = silu_mul_ref(y)
        return (y if self.residual is None else y + self.residual.double()).to(BF16)


def case_of(
    kind: Kind, rows: int, per_row: int, widths: tuple[int, ...], in_dim: int, *, adds: bool, gated: bool,
    device: torch.device,
) -> Case:  # fmt: skip
    """x and the residual as views; the last row without adapters where there are several, the first with most."""
    torch.manual_seed(rows)
    x = made(rows + 2, in_dim + 8, device=device)[1 : rows + 1, :in_dim]
    row_slots = torch.randint(-1, len(RANKS), (rows, per_row), device=device)
    row_slots[0, 0] = 4
    if rows > 1:
        row_slots[-1] = -1
    residual = made(rows, sum(widths) + 8, device=device)[:, :-8] if adds else None
    weights = torch.rand(rows, per_row, device=device) + 0.1
    weight, factors = coded(kind, sum(widths), in_dim, device), slots_of(widths, in_dim, device)
    return Case(x, weight, factors, residual, gated, row_slots, weights)


QKV, ADDS, GATED, MERGED = ((128, 64, 64), 0, 0), ((192,), 1, 0), ((128, 128), 0, 1), ((256,), 0, 1)
CASES = [
    (1, 2, 1, QKV), (1, 1, 2, ADDS), (1, 1, 4, GATED), (1, 3, 1, MERGED), (7, 1, 4, QKV), (7, 2, 1, GATED),
    (16, 3, 2, ADDS), (16, 1, 2, GATED), (29, 1, 1, QKV), (29, 2, 4, MERGED), (64, 1, 4, ADDS), (64, 1, 2, GATED),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "per_row", "splits", "variant"), CASES)
def test_adapters_within_the_product(
    rows: int, per_row: int, splits: int, variant: tuple[tuple[int, ...], int, int], device: torch.device
) -> None:
    """Also parts of W with nothing to multiply; then again, and rows alone."""
    widths, adds, gated = variant
    case = case_of("int8" if rows == 7 else "fp8", rows, per_row, widths, 600, adds=bool(adds), gated=bool(gated),
                   device=device)  # fmt: skip
    arrivals = torch.zeros(64, dtype=torch.int32, device=device)
    cut = {**choose_cut(rows, sum(widths), 600), "SPLITS": splits}

    def product(named: torch.Tensor) -> torch.Tensor:
        lora = case.adapters(named)
        assert fits(case.x, case.weight, case.factors)
        assert lora.foldable
        mine = None if case.residual is None else case.residual.clone()
        got = quantised_lora_triton(case.x, case.weight, lora.fold(0, case.x), mine, bool(gated), arrivals, cut)
        assert mine is None or got is mine
        assert not arrivals.any()
        assert not lora.counters[1:].any()
        return got

    got = product(case.row_slots)
    torch.testing.assert_close(got, case.expected(), rtol=RTOL, atol=ATOL)
    assert torch.equal(product(case.row_slots), got)
    for row in {0, rows // 2}:
        alone = torch.full_like(case.row_slots, -1)
        alone[row] = case.row_slots[row]
        assert torch.equal(product(alone)[row], got[row])
    mine = None if case.residual is None else case.residual.clone()
    base = quantised_rows_triton(case.x, case.weight, mine, bool(gated), arrivals, cut)
    none = product(torch.full_like(case.row_slots, -1))
    torch.testing.assert_close(none, base, rtol=RTOL, atol=ATOL)
    assert not torch.allclose(got, base, rtol=RTOL, atol=ATOL)  # adapters matter here


@pytest.mark.parametrize("many", [False, True])
def test_a_long_input(many: bool, device: torch.device) -> None:
    """Several chunks of A and, unless many groups are expected, several groups a program."""
    case = case_of("fp8", 12, 2, (64, 64), 4400, adds=True, gated=False, device=device)
    assert case.residual is not None
    lanes, fold = choose_fold(16, 4400, 16, many=many)
    assert fold["CHUNKS"] > 1
    assert lanes < int(case.adapters(case.row_slots).tiles.counts) // 4 * 2 or many
    lora, mine = case.adapters(case.row_slots, many=many).fold(0, case.x), case.residual.clone()
    got = quantised_lora_triton(case.x, case.weight, lora, mine)
    torch.testing.assert_close(got, case.expected(), rtol=RTOL, atol=ATOL)
    assert not lora.arrivals.any()


@pytest.fixture
def triton_everywhere(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", dispatch.TRITON_DEVICES | {device.type})


@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("rows", [1, 6])
def test_a_storage_takes_adapters_into_every_product(rows: int, device: torch.device) -> None:
    """As its grouped path adds them."""
    widths, row_slots = (64, 64), torch.arange(rows, device=device)[:, None] % len(RANKS)
    case = case_of("fp8", rows, 1, widths, 192, adds=True, gated=True, device=device)
    storage = QuantisedStorage("fp8", 192, widths, bias=False, dtype=BF16, device=device)
    for part in storage.parameters():
        part["weight"].load(made(64, 192, device=device))
    x, y = case.x, made(rows, 128, device=device)

    def run(product: Callable[[GroupedLora], torch.Tensor]) -> torch.Tensor:
        return product(case.adapters(row_slots))

    def onto(lora: GroupedLora, *, folded: bool) -> torch.Tensor:
        mine = y.clone()
        if folded:
            storage.add_matmul(mine, x, lora=storage.fold(x, lora, 0))
        else:
            storage.add_matmul(mine, x)
            lora.update(0, x).add_to(mine)
        return mine

    def plain(lora: GroupedLora) -> torch.Tensor:
        mine = storage.matmul(x)
        lora.update(0, x).add_to(mine)
        return mine

    folded = [
        run(lambda lora: storage.matmul(x, lora=storage.fold(x, lora, 0))),
        run(lambda lora: storage.matmul(x, gated=True, lora=storage.fold(x, lora, 0))),
        run(lambda lora: onto(lora, folded=True)),
    ]
    beside = [
        run(plain), run(lambda lora: lora.update(0, x).silu_mul(storage.matmul(x))),
        run(lambda lora: onto(lora, folded=False)),
    ]  # fmt: skip
    assert storage.fold(x, case.adapters(row_slots), 0) is not None
    for got, expected in zip(folded, beside, strict=True):
        torch.testing.assert_close(got, expected, rtol=RTOL, atol=ATOL)


@pytest.mark.usefixtures("triton_everywhere")
def test_what_does_not_fit_is_added_beside(device: torch.device) -> None:
    """A bias; parts that end within a tile; more rows than these products take."""
    for widths, bias, rows in (((64,), True, 3), ((40, 24), False, 3), ((64,), False, 65)):
        case = case_of("fp8", rows, 1, widths, 64, adds=False, gated=False, device=device)
        storage = QuantisedStorage("fp8", 64, widths, bias=bias, dtype=BF16, device=device)
        assert storage.fold(case.x, case.adapters(case.row_slots), 0) is None
