"""The first half of a grouped LoRA: the activations times the A of each token's adapters, cut along in_features.

    s[k, place * M + j, p, r] = weight · Σ_{i in split k} x[token, i] · a[(slot * P + p) * R + r, i]

for every place of `LoraTiles`, j the number of its token's codes smaller than the slot's, weight the sum over those
that name it. x [T, in_features] and a [S * P * R, in_features] in the model's dtype; s float32, [splits, places * M, P,
R rounded up to RANKS], written only where a token uses a slot, up to the slot's rank and zeros to the next multiple of
RANKS (so that it is read without a mask). Splits keep a small batch's reading of A in many programs; the second half
adds them in order.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.lora.tiles import _NONE


@triton.jit
def slot_use(codes, code, at, M: tl.constexpr):
    """Of the places `at` [TILE] with `codes` [TILE, MP]: who uses `code`, and the row of s that it has there."""
    return tl.sum((codes == code).to(tl.int32), 1) > 0, at * M + tl.sum((codes < code).to(tl.int32), 1)


@triton.jit
def next_code(codes, code):
    """The smallest code of the tile after `code`."""
    return tl.min(tl.where(codes > code, codes, _NONE))


@triton.jit(do_not_specialize=["parts"])
def shrink_kernel(
    x, a, s, tile_codes, tokens, codes, weights,
    in_features, max_rank, x_stride, split_stride, parts, features,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program: a tile, `features` of in_features, one part, RANKS of its rank; all slots of the tile in turn."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # from here on `expand` may read everything but s
    rank_blocks = tl.cdiv(max_rank, RANKS)
    part, first = tl.program_id(0) // rank_blocks, tl.program_id(0) % rank_blocks * RANKS
    split, tile = tl.program_id(1), tl.program_id(2)
    code = tl.load(tile_codes + tile)
    if code == _NONE:
        return
    at = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, MP)
    token = tl.load(tokens + at).to(tl.int64)
    token_codes = tl.load(codes + at[:, None] * M + m[None, :], mask=m[None, :] < M, other=_NONE)
    token_weights = tl.load(weights + at[:, None] * M + m[None, :], mask=m[None, :] < M, other=0.0)
    r = first + tl.arange(0, RANKS)
    depth = tl.arange(0, DEPTH)
    while code != _NONE:
        rank = code & 0xFFFF
        if first < rank:
            used, s_row = slot_use(token_codes, code, at, M)
            weight = tl.sum(tl.where(token_codes == code, token_weights, 0.0), 1)
            x_rows = x + token[:, None] * x_stride
            a_rows = a + (((code >> 16).to(tl.int64) * parts + part) * max_rank + r)[:, None] * in_features
            product = tl.zeros([TILE, RANKS], tl.float32)
            for offset in tl.range(0, features, DEPTH, num_stages=STAGES):
                i = split * features + offset + depth
                x_tile = tl.load(x_rows + i[None, :], mask=used[:, None] & (i[None, :] < in_features), other=0.0)
                a_tile = tl.load(a_rows + i[None, :], mask=(r[:, None] < rank) & (i[None, :] < in_features), other=0.0)
                product = tl.dot(x_tile, tl.trans(a_tile), product, input_precision=PRECISION)
            s_rows = s + split * split_stride + (s_row.to(tl.int64) * parts + part)[:, None] * (rank_blocks * RANKS)
            tl.store(s_rows + r[None, :], product * weight[:, None], mask=used[:, None])
        code = next_code(token_codes, code)
