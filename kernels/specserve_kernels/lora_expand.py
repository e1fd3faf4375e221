"""The second half of a grouped LoRA: the shrunk activations times B, added to y in place.

    y[token, column_p + c] += Σ_slots Σ_r (Σ_k s[k, place * M + j, p, r]) · b[slot, column_p * R + r * width_p + c]

over the slots of the token, in the order of the slots; s as `lora_shrink` leaves it. b [S, R * out_features] in the
model's dtype holds for each part p of a slot, one after the other, its Bᵀ [R, width_p]: real ranks are whole rows, read
alone. The sum is in float32 and added to y once. A program owns its piece of y: no atomics, always the same result.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.lora_shrink import next_code, slot_use
from specserve_kernels.lora_tiles import _NONE


@triton.jit
def _part_of_block(block, WIDTHS: tl.constexpr, COLUMNS: tl.constexpr):
    """(part, its first column, its width, first column within it) of the block of COLUMNS columns."""
    part, column, width, before = 0, 0, 0, 0
    first_block, first_column = 0, 0
    for p in tl.static_range(len(WIDTHS)):
        if block >= first_block:
            part, column, width, before = p, first_column, WIDTHS[p], first_block
        first_block += (WIDTHS[p] + COLUMNS - 1) // COLUMNS
        first_column += WIDTHS[p]
    return part, column, width, (block - before) * COLUMNS


@triton.jit
def expand_kernel(
    y, b, s, tile_codes, tokens, codes,
    out_features, max_rank, y_stride, split_stride,
    WIDTHS: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
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
    token_codes = tl.load(codes + at[:, None] * M + m[None, :], mask=m[None, :] < M, other=_NONE)
    part, column, width, first = _part_of_block(tl.program_id(0), WIDTHS, COLUMNS)
    c = first + tl.arange(0, COLUMNS)
    y_tile = y + column + (token[:, None] * y_stride + c[None, :])
    y_mask = (token >= 0)[:, None] & (c < width)[None, :]
    base = tl.load(y_tile, mask=y_mask, other=0.0)
    padded_rank = tl.cdiv(max_rank, RANKS) * RANKS
    product = tl.zeros([TILE, COLUMNS], tl.float32)
    while code != _NONE:
        rank = code & 0xFFFF
        match, s_row = slot_use(token_codes, code, at, M, MP)
        used = tl.max(match.to(tl.int32), 1) > 0
        s_rows = s + (s_row.to(tl.int64)[:, None] * len(WIDTHS) + part) * padded_rank
        b_part = b + ((code >> 16).to(tl.int64) * out_features + column) * max_rank + c[None, :]
        for first_rank in tl.range(0, rank, RANKS, num_stages=1):
            r = first_rank + tl.arange(0, RANKS)
            b_tile = tl.load(b_part + r[:, None] * width, mask=(r < rank)[:, None] & (c < width)[None, :], other=0.0)
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()  # for s; all that is read above was there before `shrink` began
            shrunk = tl.load(s_rows + r[None, :], mask=used[:, None], other=0.0)
            for split in tl.static_range(1, SPLITS):
                shrunk += tl.load(s_rows + split * split_stride + r[None, :], mask=used[:, None], other=0.0)
            product = tl.dot(shrunk.to(FACTOR), b_tile.to(FACTOR), product, input_precision=PRECISION)
        code = next_code(token_codes, code)
    tl.store(y_tile, (base.to(tl.float32) + product).to(y.dtype.element_ty), mask=y_mask)
