"""Which adapters the tokens of a forward use, made once on the device, so that a graph may be replayed with others.

Inputs, all live on the device: token_rows [T] int64, the row of each token (negative: none); row_slots [rows, M] int64,
the adapter slots of each row (negative: none); row_weights [rows, M] float32; slot_ranks [S] int64, 0 where a slot is
empty. Tokens keep their order: tile t holds the tokens t * tile … of the batch. Ranks are counted in blocks of
RANK_BLOCK, so that an adapter costs its own ranks, whatever the largest is. Requests lie together, so the tile of a
prefill uses few slots; that of a decode as many as it has rows (the batches of Punica's BGMV, Chen et al. 2023).
No atomics on floats: always the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched

RANK_BLOCK = 16
LARGEST_TILE = 64


@dataclass(frozen=True, slots=True, eq=False)
class LoraTiles:
    """N tiles of `tile` tokens; the last may reach beyond the batch.

    token_slots [N * tile, M] int32: the token's slots, -1 for none. A slot that a row names twice stands once, and an
    empty one not at all. token_weights [N * tile, M] float32: theirs, the sum where a slot was named twice.
    counts [N] int32: how many rank blocks the tile's tokens use; blocks [N, most] int32: their codes, ascending:
    (slot << 16) | (first rank // 16 << 8) | ranks in use (1 … 16). What stands behind counts[t] is not to be read.
    """

    tile: int
    token_slots: Tensor
    token_weights: Tensor
    counts: Tensor
    blocks: Tensor


def tile_size(num_tokens: int) -> int:
    """Tokens of a tile: up to 32 tokens are one."""
    return 16 if num_tokens <= 16 else 32 if num_tokens <= 32 else LARGEST_TILE


def lora_tiles(
    token_rows: Tensor, row_slots: Tensor, row_weights: Tensor, slot_ranks: Tensor, max_rank: int,
    tile: int | None = None,
) -> LoraTiles:  # fmt: skip
    """The above for ranks up to `max_rank`: one launch, a few µs, no synchronisation. `tile`: instead of `tile_size`'s.

    It has ended before any later kernel starts, so that those may read it before they wait for each other (see
    overlap).
    """
    num_tokens, num_slots, per_row = token_rows.shape[0], slot_ranks.shape[0], row_slots.shape[1]
    assert token_rows.dtype == row_slots.dtype == slot_ranks.dtype == torch.int64, "rows, slots and ranks are int64"
    assert row_weights.dtype == torch.float32, row_weights.dtype
    assert row_slots.shape == row_weights.shape, (row_slots.shape, row_weights.shape)
    assert token_rows.stride(0) == slot_ranks.stride(0) == row_slots.stride(1) == row_weights.stride(1) == 1
    assert num_slots < 2**15 and max_rank <= 256 * RANK_BLOCK, "a code holds 15 bits of slot and 8 of block"
    tile = tile or tile_size(num_tokens)
    num_tiles = max(1, cdiv(num_tokens, tile))
    most = min(num_slots, tile * per_row) * cdiv(max_rank, RANK_BLOCK)
    token_slots = token_rows.new_empty((num_tiles * tile, per_row), dtype=torch.int32)
    token_weights = row_weights.new_empty((num_tiles * tile, per_row))
    counts = token_rows.new_empty(num_tiles, dtype=torch.int32)
    blocks = token_rows.new_empty((num_tiles, most), dtype=torch.int32)
    _tiles_kernel[(num_tiles,)](
        token_rows, row_slots, row_weights, slot_ranks, token_slots, token_weights, counts, blocks,
        num_tokens, row_slots.stride(0), row_weights.stride(0), num_slots, most,
        M=per_row, MP=power_of_2(per_row), TILE=tile, BINS=max(32, power_of_2(num_slots)),
        num_warps=4,
    )  # fmt: skip
    return LoraTiles(tile, token_slots, token_weights, counts, blocks)


def block_weights(tiles: LoraTiles) -> Tensor:
    """What each token weighs its tile's blocks with: [N * tile, most] float32, 0 where it does not use them, and not to
    be read behind counts[t]. One launch, as `lora_tiles`."""
    num_tiles, most = tiles.blocks.shape
    weights = tiles.token_weights.new_empty(num_tiles * tiles.tile, most)
    _weights_kernel[(num_tiles, cdiv(most, 16))](
        tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks, weights, most,
        M=tiles.token_slots.shape[1], TILE=tiles.tile, num_warps=4,
    )  # fmt: skip
    return weights


@triton.jit
def load_code(blocks, block, count, most, none):
    """The tile's codes of these blocks, `none` from `count` on. There is memory up to `most`: this need not wait for
    `count` first, which takes as long as the codes."""
    code = tl.load(blocks + block, mask=block < most, other=0)
    return tl.where(block < count, code, none)


@relaunched
@triton.jit(do_not_specialize=["most"])
def _weights_kernel(
    token_slots, token_weights, counts, blocks, weights, most, M: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Sixteen blocks of a tile a program."""
    tile, block = tl.program_id(0), tl.program_id(1) * 16 + tl.arange(0, 16)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    count = tl.load(counts + tile)
    inside = block < count
    slot = load_code(blocks + tile * most, block, count, most, -131072) >> 16  # slot -2: nobody's
    weight = tl.zeros([TILE, 16], tl.float32)
    for m in tl.static_range(M):
        own = tl.load(token_slots + token * M + m) == slot
        weight = tl.where(own, tl.load(token_weights + token * M + m), weight)
    tl.store(weights + token * most + block, weight, mask=inside & (token >= 0))


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "num_slots", "most"])
def _tiles_kernel(
    token_rows, row_slots, row_weights, slot_ranks, token_slots, token_weights, counts, blocks,
    num_tokens, row_stride, weight_stride, num_slots, most,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """A tile a program: its tokens' slots and weights, then the blocks of the slots that any of them uses."""
    tile = tl.program_id(0)
    token = tile * TILE + tl.arange(0, TILE)
    row = tl.load(token_rows + token, mask=token < num_tokens, other=-1)
    m, j = tl.arange(0, MP)[None, :], tl.arange(0, MP)[None, None, :]
    slot = tl.load(row_slots + row[:, None] * row_stride + m, mask=(row >= 0)[:, None] & (m < M), other=-1)
    named = (row >= 0)[:, None, None] & (j < M)
    other = tl.load(row_slots + row[:, None, None] * row_stride + j, mask=named, other=-1)
    weight = tl.load(row_weights + row[:, None, None] * weight_stride + j, mask=named, other=0.0)
    same = other == slot[:, :, None]
    inside = (slot >= 0) & (slot < num_slots)
    repeated = tl.sum((same & (j < m[:, :, None])).to(tl.int32), 2) > 0
    used = inside & (repeated == 0) & (tl.load(slot_ranks + slot, mask=inside, other=0) > 0)
    place = token[:, None] * M + m
    tl.store(token_slots + place, tl.where(used, slot, -1).to(tl.int32), mask=m < M)
    tl.store(token_weights + place, tl.sum(tl.where(same, weight, 0.0), 2), mask=m < M)

    flat = tl.reshape(tl.where(used, slot, 0).to(tl.int32), [TILE * MP])
    times = tl.histogram(flat, BINS, mask=tl.reshape(used, [TILE * MP]))
    bins = tl.arange(0, BINS)
    rank = tl.load(slot_ranks + bins, mask=(bins < num_slots) & (times > 0), other=0).to(tl.int32)
    own = (rank + 15) // 16
    behind = tl.cumsum(own, 0)
    tl.store(counts + tile, tl.sum(own, 0))
    most_own, block = tl.max(own, 0), 0
    while block < most_own:
        code = (bins << 16) | (block << 8) | tl.minimum(rank - block * 16, 16)
        tl.store(blocks + tile * most + behind - own + block, code, mask=block < own)
        block += 1
