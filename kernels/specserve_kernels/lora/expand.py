"""The second half of a grouped LoRA: the shrunk activations times B, added to y in place.

    y[token, column_p + c] += Σ_slots Σ_r (Σ_k s[k, place * M + j, p, r]) · b[slot, column_p * R + r * width_p + c]

over the slots of the token, in the order of the slots; s as `lora_shrink` leaves it. b [S, R * out_features] in the
model's dtype holds for each part p of a slot, one after the other, its Bᵀ [R, width_p]: real ranks are whole rows, read
alone. Summed in float32, y included, and rounded once. A program owns its piece of y: no atomics, the same result
whenever it is run.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.lora.shrink import next_code, slot_use
from specserve_kernels.lora.tiles import _NONE

MAX_PARTS = 4


@triton.jit
def _part_of_block(block, w0, w1, w2, w3, COLUMNS: tl.constexpr):
    """(part, its first column, its width, first column within it) of the block of COLUMNS columns."""
    part, column, width = 0, 0, w0
    for p in tl.static_range(1, 4):
        blocks = tl.cdiv(width, COLUMNS)
        if (part == p - 1) & (block >= blocks):
            block -= blocks
            part, column = p, column + width
            width = w1 if p == 1 else w2 if p == 2 else w3
    return part, column, width, block * COLUMNS


@triton.jit
def _b_tile(b_part, code, first_rank, slot_stride, width, c, RANKS: tl.constexpr):
    """[RANKS, COLUMNS] of the slot's Bᵀ from row first_rank on, zeros beyond its rank; nothing is read for NONE."""
    r = first_rank + tl.arange(0, RANKS)[:, None]
    rows = b_part + (code >> 16).to(tl.int64) * slot_stride + r * width
    return tl.load(rows, mask=(r < code & 0xFFFF) & (code != _NONE) & (c < width)[None, :], other=0.0)


@triton.jit
def _sum_splits(s_rows, used, split_stride, RANKS: tl.constexpr, SPLITS: tl.constexpr):
    """s of RANKS ranks, [TILE, RANKS]. All splits are loaded at once: adding load by load would wait for each."""
    k, r = tl.arange(0, SPLITS)[:, None, None], tl.arange(0, RANKS)[None, None, :]
    return tl.sum(tl.load(s_rows[None, :, None] + k * split_stride + r, mask=used[None, :, None], other=0.0), 0)


@triton.jit(do_not_specialize=["parts"])
def expand_kernel(
    y, b, s, tile_codes, tokens, codes,
    w0, w1, w2, w3, parts, out_features, max_rank, y_stride, split_stride,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: a tile and COLUMNS columns of one part; all slots of the tile in turn, RANKS of the rank at once."""
    tile = tl.program_id(1)
    code = tl.load(tile_codes + tile)
    if code == _NONE:
        return
    at = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, MP)
    token = tl.load(tokens + at)
    part, column, width, first = _part_of_block(tl.program_id(0), w0, w1, w2, w3, COLUMNS)
    c = first + tl.arange(0, COLUMNS)
    b_part = b + column * max_rank + c[None, :]
    slot_stride = out_features * max_rank
    b_tile = _b_tile(b_part, code, 0, slot_stride, width, c, RANKS)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()  # for s and y; all that is read above was there before `shrink` began
    y_tile = y + column + (token[:, None] * y_stride + c[None, :])
    y_mask = (token >= 0)[:, None] & (c < width)[None, :]
    base = tl.load(y_tile, mask=y_mask, other=0.0)
    s_part = s + part * (tl.cdiv(max_rank, RANKS) * RANKS)
    row_stride = parts * (tl.cdiv(max_rank, RANKS) * RANKS)
    total = tl.zeros([TILE, COLUMNS], tl.float32)
    first_rank = 0
    while first_rank < code & 0xFFFF:  # the smallest slot is every token's, and first in its rows of s
        s_tile = s_part + (at * M).to(tl.int64) * row_stride + tl.multiple_of(first_rank, RANKS)
        shrunk = _sum_splits(s_tile, token >= 0, split_stride, RANKS, SPLITS)
        total = tl.dot(shrunk.to(FACTOR), b_tile.to(FACTOR), total, input_precision=PRECISION)
        first_rank += RANKS
        b_tile = _b_tile(b_part, code, first_rank, slot_stride, width, c, RANKS)
    token_codes = tl.load(codes + at[:, None] * M + m[None, :], mask=m[None, :] < M, other=_NONE)
    code = next_code(token_codes, code)
    while code != _NONE:
        used, s_row = slot_use(token_codes, code, at, M)
        first_rank = 0
        while first_rank < code & 0xFFFF:
            b_tile = _b_tile(b_part, code, first_rank, slot_stride, width, c, RANKS)
            s_tile = s_part + s_row.to(tl.int64) * row_stride + tl.multiple_of(first_rank, RANKS)
            shrunk = _sum_splits(s_tile, used, split_stride, RANKS, SPLITS)
            total = tl.dot(shrunk.to(FACTOR), b_tile.to(FACTOR), total, input_precision=PRECISION)
            first_rank += RANKS
        code = next_code(token_codes, code)
    tl.store(y_tile, (base.to(tl.float32) + total).to(y.dtype.element_ty), mask=y_mask)
