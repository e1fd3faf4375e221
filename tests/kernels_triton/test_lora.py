"""LoRA grouped on the device against slot by slot in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specserve_kernels.lora import grouped as lora_grouped
from specserve_kernels.lora.grouped import SlotFactors, grouped_lora, grouped_lora_ref
from specserve_kernels.lora.tiles import NONE, lora_tiles
from specserve_kernels.tolerances import OP

SLOTS, MAX_RANK, PER_ROW, ROWS = 6, 20, 3, 8
RANKS = [3, 0, 20, 1, 17, 16]  # one slot is empty, one is full


class Mix(NamedTuple):
    """Rows with no, one, several and repeated slots; tokens of all rows interleaved, some without a row."""

    token_rows: Tensor
    row_slots: Tensor
    row_weights: Tensor
    slot_ranks: Tensor


def mixed(tokens: int, device: torch.device, seed: int = 0) -> Mix:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, SLOTS, (ROWS, PER_ROW), generator=generator)
    slots[0], slots[1], slots[2] = -1, torch.tensor([2, 2, 4]), torch.tensor([-1, 5, -1])
    weights = torch.rand(ROWS, PER_ROW, generator=generator) - 0.3
    token_rows = torch.randint(-1, ROWS, (tokens,), generator=generator)
    return Mix(*(tensor.to(device) for tensor in (token_rows, slots, weights, torch.tensor(RANKS))))


def factors(in_features: int, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> SlotFactors:
    generator = torch.Generator().manual_seed(in_features)
    a = torch.randn(SLOTS * len(widths) * MAX_RANK, in_features, generator=generator) / in_features**0.5
    b = torch.randn(SLOTS, MAX_RANK * sum(widths), generator=generator) * 0.1
    return SlotFactors(a.to(device, dtype), b.to(device, dtype), widths)


def randn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def oracle(x: Tensor, y: Tensor, linear: SlotFactors, mix: Mix) -> Tensor:
    wide = SlotFactors(linear.a.double(), linear.b.double(), linear.widths)
    return grouped_lora_ref(x.double(), y.double(), wide, *mix).to(y.dtype)


def close(got: Tensor, want: Tensor) -> None:
    rtol, atol = OP[want.dtype]
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37])
def test_mixed_batches(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Mixed ranks and slots, one to three parts, several splits; one batch for all linears."""
    mix = mixed(tokens, device)
    linears = [factors(40, (24, 8, 9), dtype, device), factors(300, (12,), dtype, device)]
    batch = grouped_lora(linears, MAX_RANK, mix.slot_ranks, *mix[:3])
    for index, linear in enumerate(linears):
        x = randn(tokens, linear.a.shape[1], dtype=dtype, device=device)
        y = randn(tokens, sum(linear.widths), dtype=dtype, device=device, seed=1)
        want, got = oracle(x, y, linear, mix), y.clone()
        batch.apply(index, x, got)
        close(got, want)
        idle = mix.token_rows <= 0  # no row, or the row without slots
        assert torch.equal(got[idle], y[idle])


@pytest.mark.parametrize("tokens", [5, 150])
def test_large_tiles(tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a prefill takes, with fewer tokens; x and y are columns of wider tensors."""
    monkeypatch.setattr(lora_grouped, "_FEW_TOKENS", 0)
    mix = mixed(tokens, device)
    linear = factors(24, (8, 16), torch.float32, device)
    x = randn(tokens, 40, dtype=torch.float32, device=device)[:, 8:32]
    y = randn(tokens, 32, dtype=torch.float32, device=device)[:, 4:28]
    want = oracle(x, y, linear, mix)
    grouped_lora([linear], MAX_RANK, mix.slot_ranks, *mix[:3]).apply(0, x, y)
    close(y, want)


@pytest.mark.parametrize(("tokens", "tile"), [(1, 16), (100, 16), (1500, 64)])
def test_tiles(tokens: int, tile: int, device: torch.device) -> None:
    """Every token with an adapter stands in one tile, in order, beside tokens of its smallest slot."""
    mix = mixed(tokens, device)
    tiles = lora_tiles(mix.token_rows, mix.row_slots, mix.row_weights, mix.slot_ranks, tile)
    tile_codes = tiles.tile_codes.tolist()
    used = sum(code != NONE for code in tile_codes)
    assert all(code == NONE for code in tile_codes[used:])
    places = tiles.tokens.view(-1, tile).tolist()[:used]
    slots_of = [[] if row < 0 else [s for s in mix.row_slots[row].tolist() if s >= 0 and RANKS[s]] for row in mix[0]]
    placed = [
        (code >> 16, token) for code, tile in zip(tile_codes, places, strict=False) for token in tile if token >= 0
    ]
    assert placed == sorted((min(slots), token) for token, slots in enumerate(slots_of) if slots)
    codes, weights = tiles.codes.view(-1, tile, PER_ROW), tiles.weights.view(-1, tile, PER_ROW)
    for index, tokens_there in enumerate(places):
        for place, token in enumerate(tokens_there):
            there = codes[index, place].tolist()
            assert [code >> 16 for code in there if code != NONE] == (slots_of[token] if token >= 0 else [])
            assert all(code & 0xFFFF == RANKS[code >> 16] for code in there if code != NONE)
            if token >= 0:
                assert torch.equal(weights[index, place], mix.row_weights[mix.token_rows[token]])


def test_nothing_to_add(device: torch.device) -> None:
    mix = mixed(20, device)._replace(slot_ranks=torch.zeros(SLOTS, dtype=torch.int64, device=device))
    linear = factors(16, (8,), torch.float32, device)
    y = torch.full((20, 8), float("nan"), device=device)
    grouped_lora([linear], MAX_RANK, mix.slot_ranks, *mix[:3]).apply(0, torch.ones(20, 16, device=device), y)
    assert y.isnan().all()


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """Bitwise: the same again, and the same when every other row has other adapters; overflows stay where they are."""
    dtype, tokens = torch.float16, 20
    linear = factors(40, (24, 8), dtype, device)
    mix = mixed(tokens, device)
    mix.row_slots[3] = torch.tensor([0, 4, -1])
    mix.row_slots[4:] = torch.tensor([0, 5, 2])  # they share tiles with row 3
    mix.token_rows[:] = torch.arange(tokens) % 5 + 3
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (40, 32))

    def apply(mix: Mix, x: Tensor) -> Tensor:
        out = y.clone()
        grouped_lora([linear], MAX_RANK, mix.slot_ranks, *mix[:3]).apply(0, x, out)
        return out

    first = apply(mix, x)
    assert torch.equal(apply(mix, x), first)
    row_3 = mix.token_rows == 3
    huge = torch.where(row_3[:, None], x, x * 6e4)
    mix.row_slots[4:] = torch.tensor([0, 4, 3])
    second = apply(mix, huge)
    assert not second[~row_3].isfinite().all()
    assert torch.equal(second[row_3], first[row_3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_graph_sees_todays_slots(dtype: torch.dtype, device: torch.device) -> None:
    """Rows, slots, weights, ranks and factors are overwritten between the replays of one graph."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    tokens, linear, mix = 50, factors(256, (64, 32), dtype, device), mixed(50, device)
    x, y = (randn(tokens, width, dtype=dtype, device=device) for width in (256, 96))
    out = y.clone()

    def forward() -> None:
        out.copy_(y)
        grouped_lora([linear], MAX_RANK, mix.slot_ranks, *mix[:3]).apply(0, x, out)

    forward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for seed in range(3):
        for live, new in zip(mix, mixed(tokens, device, seed), strict=True):
            live.copy_(new)
        mix.slot_ranks[1] = seed
        linear.a.mul_(-1)
        graph.replay()
        close(out, oracle(x, y, linear, mix))
