"""Tokens grouped by adapter on the device, so that a captured step may be replayed with other adapters.

Inputs, all live on the device: token_rows [T] int64, the row of each token (negative: none); row_slots [R, M] int64,
the adapter slots of each row (negative: none); row_weights [R, M] float32; slot_ranks [S] int64, 0 where a slot is
empty. A slot in use is written as its code (slot << 16) + rank, which brings the rank along with the slot; NONE stands
for no slot and sorts after every code.

Tokens that have an adapter are sorted by the smallest of their codes and cut into tiles of `tile` tokens, no tile
holding two smallest codes (the grouping of Punica's SGMV, Chen et al. 2023). Requests with one adapter then give tiles
of one slot; the others of a tile are found where they are used. Stable and free of atomics: always the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specserve_kernels.language import tl, triton

NONE = 2**31 - 1
_NONE = tl.constexpr(NONE)


@dataclass(frozen=True, slots=True, eq=False)
class LoraTiles:
    """Up to N tiles of `tile` places. Tiles in use come first; what stands behind them is not to be read.

    `tile_codes` [N] int32: the tile's smallest code, NONE for a tile that is not in use. `tokens` [N * tile] int32:
    -1 for a free place. `codes` [N * tile, M] int32 and `weights` [N * tile, M] float32: of the token there; a slot
    that a row names twice stands twice, and its weights are to be added.
    """

    tile: int
    tile_codes: Tensor
    tokens: Tensor
    codes: Tensor
    weights: Tensor


def lora_tiles(token_rows: Tensor, row_slots: Tensor, row_weights: Tensor, slot_ranks: Tensor, tile: int) -> LoraTiles:
    """Group the tokens as above: one launch, a few µs, no synchronisation."""
    _check(token_rows, row_slots, row_weights, slot_ranks)
    num_tokens, num_slots, per_row = token_rows.shape[0], slot_ranks.shape[0], row_slots.shape[1]
    num_tiles = max(1, min(num_tokens, num_tokens // tile + num_slots))
    tile_codes = token_rows.new_empty(num_tiles, dtype=torch.int32)
    tokens = token_rows.new_empty(num_tiles * tile, dtype=torch.int32)
    codes = token_rows.new_empty(num_tiles * tile, per_row, dtype=torch.int32)
    weights = row_weights.new_empty(num_tiles * tile, per_row)
    _tiles_kernel[(num_slots,)](
        token_rows, row_slots, row_weights, slot_ranks, tile_codes, tokens, codes, weights,
        num_tokens, num_tiles, row_slots.stride(0), row_weights.stride(0), num_slots=num_slots,
        M=per_row, TILE=tile, BLOCK=256 if num_tokens <= 256 else 1024, BINS=max(32, triton.next_power_of_2(num_slots)),
        num_warps=4 if num_tokens <= 256 else 8,
    )  # fmt: skip
    return LoraTiles(tile, tile_codes, tokens, codes, weights)


def _check(token_rows: Tensor, row_slots: Tensor, row_weights: Tensor, slot_ranks: Tensor) -> None:
    assert token_rows.dtype == row_slots.dtype == slot_ranks.dtype == torch.int64, "rows, slots and ranks are int64"
    assert row_weights.dtype == torch.float32, row_weights.dtype
    assert row_slots.shape == row_weights.shape, (row_slots.shape, row_weights.shape)
    assert token_rows.stride(0) == slot_ranks.stride(0) == row_slots.stride(1) == row_weights.stride(1) == 1
    assert slot_ranks.shape[0] < 2**15 - 1, "a code holds the slot in 15 bits"


@triton.jit
def _codes_at(rows, mask, m, row_slots, row_stride, slot_ranks, num_slots):
    """Codes of column m of row_slots for `rows` [BLOCK] int64."""
    slot = tl.load(row_slots + rows * row_stride + m, mask=mask, other=-1)
    mask = (slot >= 0) & (slot < num_slots)
    rank = tl.load(slot_ranks + slot, mask=mask, other=0)
    return tl.where(rank > 0, (slot << 16) + rank, _NONE).to(tl.int32)


@triton.jit
def _smallest_codes(token_rows, first, num_tokens, row_slots, row_stride, slot_ranks, num_slots,
                    M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of the tokens first … first + BLOCK: their indices, rows and smallest codes."""
    token = first + tl.arange(0, BLOCK)
    row = tl.load(token_rows + token, mask=token < num_tokens, other=-1)
    smallest = tl.full([BLOCK], _NONE, tl.int32)
    for m in tl.static_range(M):
        smallest = tl.minimum(smallest, _codes_at(row, row >= 0, m, row_slots, row_stride, slot_ranks, num_slots))
    return token, row, smallest


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "num_slots"])
def _tiles_kernel(
    token_rows, row_slots, row_weights, slot_ranks, tile_codes, tokens, codes, weights,
    num_tokens, num_tiles, row_stride, weight_stride, num_slots,
    M: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program a slot: counts the tokens of all slots, then places those whose smallest code is its own."""
    slot = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    first = 0
    while first < num_tokens:
        _, _, smallest = _smallest_codes(
            token_rows, first, num_tokens, row_slots, row_stride, slot_ranks, num_slots, M, BLOCK
        )
        used = smallest != _NONE
        counts += tl.histogram(tl.where(used, smallest >> 16, 0), BINS, mask=used)
        first += BLOCK
    tiles = tl.cdiv(counts, TILE)
    if slot == 0:
        unused = tl.sum(tiles, 0)
        while unused < num_tiles:
            behind = unused + tl.arange(0, BLOCK)
            tl.store(tile_codes + behind, _NONE, mask=behind < num_tiles)
            unused += BLOCK
    own_tiles = tl.sum(tl.where(bins == slot, tiles, 0), 0)
    if own_tiles == 0:
        return
    first_tile = tl.sum(tl.where(bins < slot, tiles, 0), 0)
    code = ((slot << 16) + tl.load(slot_ranks + slot)).to(tl.int32)
    coded = 0
    while coded < own_tiles:
        own = coded + tl.arange(0, TILE)
        tl.store(tile_codes + first_tile + own, code, mask=own < own_tiles)
        coded += TILE
    start, placed, first = first_tile * TILE, 0, 0
    while first < num_tokens:
        token, row, smallest = _smallest_codes(
            token_rows, first, num_tokens, row_slots, row_stride, slot_ranks, num_slots, M, BLOCK
        )
        mine = (smallest == code).to(tl.int32)
        at = start + placed + tl.cumsum(mine, 0) - 1
        mask = mine > 0
        tl.store(tokens + at, token, mask=mask)
        for m in tl.static_range(M):
            code_m = _codes_at(row, mask, m, row_slots, row_stride, slot_ranks, num_slots)
            tl.store(codes + at * M + m, code_m, mask=mask)
            weight = tl.load(row_weights + row * weight_stride + m, mask=mask, other=0.0)
            tl.store(weights + at * M + m, weight, mask=mask)
        placed += tl.sum(mine, 0)
        first += BLOCK
    free = placed + tl.arange(0, TILE)
    mask = free < own_tiles * TILE
    tl.store(tokens + start + free, -1, mask=mask)
    for m in tl.static_range(M):
        tl.store(codes + (start + free) * M + m, _NONE, mask=mask)
        tl.store(weights + (start + free) * M + m, 0.0, mask=mask)
