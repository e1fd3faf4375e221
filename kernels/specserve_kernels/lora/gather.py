"""What a product left behind a linear's output, brought into the dense form of `shrink`.

    s[t, p, i, 16 j + k] = weight[token, j] · tail[token, (slot * P + p) * R + 16 block + k]     token = t * tile + i

(slot, block) being the tile's j-th. The kernels that add B then read a tile's s as it is, and multiply four blocks at
once. Tiles with many requests' tokens are worth the launch; those of one request, with one or two slots' ranks, are
not: their s is read where it lies (see `expand`).
"""

from __future__ import annotations

from torch import Tensor

from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.tiles import RANK_BLOCK, LoraTiles, load_code
from specserve_kernels.overlap import overlaps, wait

_BLOCKS = tl.constexpr(4)
"""Rank blocks of a program: the dense form's columns are zeros up to a multiple of so many."""


def gather_shrunk(tail: Tensor, parts: int, rank_stride: int, tiles: LoraTiles, weights: Tensor) -> Tensor:
    """s [N, P, tile, K] of tail [T, S * P * R], rows apart, in its dtype; weights as `block_weights` has them."""
    num_tiles, most = tiles.blocks.shape
    num_tokens = tail.shape[0]
    assert tail.stride(1) == 1 and weights.shape == (num_tiles * tiles.tile, most), (tail.stride(), weights.shape)
    s = tail.new_empty(num_tiles, parts, tiles.tile, cdiv(most * RANK_BLOCK, 128) * 128)
    pdl = overlaps(tail)
    _gather_kernel[(num_tiles, parts, cdiv(most, _BLOCKS.value))](
        tail, s, weights, tiles.counts, tiles.blocks, num_tokens, most, rank_stride, tail.stride(0), s.stride(2),
        TILE=tiles.tile, PARTS=parts, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return s


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"])
def _gather_kernel(
    tail, s, weights, counts, blocks, num_tokens, most, rank_stride, tail_stride, s_stride,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Four rank blocks of one part of a tile a program. Others' ranks may be infinite, and so is what lies beyond."""
    tile, part, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * _BLOCKS
    count = tl.load(counts + tile)
    lane, row = tl.arange(0, _BLOCKS * 16)[None, :], tl.arange(0, TILE)[:, None]
    token, block = tile * TILE + row, first + lane // 16
    code = load_code(blocks + tile * most, block, count, most, 0)
    weight = tl.where(block < count, tl.load(weights + token * most + block, mask=block < most, other=0.0), 0.0)
    column = ((code >> 16) * PARTS + part) * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
    own = (weight != 0.0) & (lane % 16 < (code & 255)) & (token < num_tokens)
    wait(PDL)
    if first < count:
        shrunk = tl.load(tail + token.to(tl.int64) * tail_stride + column, mask=own, other=0.0).to(tl.float32) * weight
        at = s + ((tile * PARTS + part) * TILE + row) * s_stride + first * 16 + lane
        tl.store(at, shrunk.to(s.dtype.element_ty))
