"""The first half of a LoRA whose second half is part of the linear's own product: s as that product reads it.

    s[p, token, 16 j + i] = weight[token, slot_j] · x[token] · a[(slot_j * P + p) * R + rank_j + i]

for the j-th rank block of the batch's one tile (see `LoraTiles`), which belongs to slot_j and begins at rank_j: dense,
zero for tokens that do not use the slot and behind the last block up to a multiple of 128. So y = x Wᵀ + s B is one
product along `in` and on along the ranks: tiles of s follow tiles of x, tiles of B those of W (skinny.hopper). Summed
in float32, rounded to x's dtype once.

x [T, in_features] and a [S * P * R, in_features], T ≤ 32. A block of one part is parted along in_features, so that a
small batch's A is read by many programs at once; the program that finishes a block last adds its parts, in their order,
so that the result does not depend on who was last, and sets the block's counter of arrivals back to 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.shrink import _USERS, _load_a, _load_x, _rows_of_a, _users, _wait_if
from specserve_kernels.lora.tiles import RANK_BLOCK, LoraTiles

STEP = 128
"""s is zero up to a multiple of so many ranks."""
_BLOCKS = tl.constexpr(STEP // RANK_BLOCK)
_PROGRAMS = 264  # two a multiprocessor


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """What a product adds to x Wᵀ: s [P * tile, ranks] in x's dtype, part p's tokens from row p * tile on; `b`
    [S * R, out_features] and `widths` as in SlotFactors, whose R is `rank_stride`. Only the ranks of the tile's
    `counts` blocks, rounded up to STEP, were written."""

    s: Tensor
    b: Tensor
    widths: tuple[int, ...]
    rank_stride: int
    tiles: LoraTiles


class FoldCut(NamedTuple):
    """Programs, parts along in_features, and the kernel's constants."""

    programs: int
    splits: int
    constants: Mapping[str, object]


@lru_cache(maxsize=1024)
def fold_cut(tile: int, in_features: int, parts: int, per_row: int, most_blocks: int, pdl: bool) -> FoldCut:
    """Parts of 512 features, or more where there would be more than 16."""
    warps, depth = 4, 128 if in_features > 256 else 64
    chunks = cdiv(in_features, warps * depth * 16)
    splits = cdiv(in_features, warps * depth * chunks)
    constants = {
        "M": per_row, "MP": power_of_2(per_row), "TILE": tile, "PARTS": parts, "SPLITS": splits,
        "SPLITS_P": power_of_2(splits), "DEPTH": depth, "CHUNKS": chunks, "WARPS": warps, "PDL": pdl,
        "num_warps": warps, "launch_pdl": pdl,
    }  # fmt: skip
    return FoldCut(min(most_blocks * parts * splits, _PROGRAMS), splits, constants)


def fold_ref(x: Tensor, a: Tensor, parts: int, rank_stride: int, tiles: LoraTiles) -> Tensor:
    """s in torch, block by block: [P * tile, ranks of the blocks rounded up to STEP]."""
    count = int(tiles.counts[0])
    s = x.new_zeros(parts, tiles.tile, cdiv(count * RANK_BLOCK, STEP) * STEP)
    for j, code in enumerate(tiles.blocks[0, :count].tolist()):
        slot, first, ranks = code >> 16, (code >> 8 & 255) * RANK_BLOCK, code & 255
        weight = (tiles.token_weights * (tiles.token_slots == slot)).sum(1)[: x.shape[0], None]
        for part in range(parts):
            row = (slot * parts + part) * rank_stride + first
            product = x.float() @ a[row : row + ranks].float().t() * weight
            s[part, : x.shape[0], j * RANK_BLOCK : j * RANK_BLOCK + ranks] = product.where(weight != 0, 0.0).to(s.dtype)
    return s.view(parts * tiles.tile, -1)


@relaunched
@triton.jit(do_not_specialize=["most"])
def _fold_kernel(
    x, a, s, partial, arrivals, token_slots, token_weights, counts, blocks,
    in_features, rank_stride, x_stride, s_stride, most,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An item is a block, one part of the linear and one split of WARPS * DEPTH * CHUNKS features: each warp multiplies
    its own. Only users of the block's slot are multiplied. A is loaded one item ahead, the first before x is there."""
    SPAN: tl.constexpr = WARPS * DEPTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0)
    count = tl.load(counts)
    items = tl.cdiv(count, _BLOCKS) * _BLOCKS * (PARTS * SPLITS)
    r = tl.arange(0, 16)
    i = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    token = tl.arange(0, TILE)
    m = tl.arange(0, MP)[None, :]
    k = tl.arange(0, SPLITS_P)[:, None, None]
    slot, rows, live = _block(blocks, item, count, a, r, rank_stride, in_features, PARTS, SPLITS)
    a_tile = _load_a(rows, live, item % SPLITS * (SPAN * CHUNKS) + i, in_features)
    if PDL:
        _wait_if((item < items) | (item == 0))  # one at least: a kernel must not end before those in front of it have
    while item < items:
        split, unit = item % SPLITS, item // SPLITS
        at = split * (SPAN * CHUNKS) + i
        chunk, users = 0, 1
        while chunk * _USERS < users:
            user, place, _, users = _users(token_slots, token_weights, slot, 0, chunk, M, MP, TILE)
            product = tl.dot(_load_x(x, user, x_stride, at, in_features), tl.permute(a_tile, (0, 2, 1)))
            for later in tl.range(1, CHUNKS, num_stages=1):
                x_tile = _load_x(x, user, x_stride, at + later * SPAN, in_features)
                more = _load_a(rows, live, at + later * SPAN, in_features)
                product = tl.dot(x_tile, tl.permute(more, (0, 2, 1)), product)
            to = partial + (item * TILE + user)[:, None] * 16 + r[None, :]
            tl.store(to, tl.sum(product, 0), mask=(place >= 0) & (r >= 0)[None, :])
            chunk += 1
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        if tl.atomic_add(arrivals + unit, 1) == SPLITS - 1:
            tl.store(arrivals + unit, 0)  # ready for the next linear
            hit = tl.load(token_slots + token[:, None] * M + m, mask=m < M, other=-1) == slot
            weight = tl.sum(tl.load(token_weights + token[:, None] * M + m, mask=(m < M) & hit, other=0.0), 1)
            uses = tl.max(hit.to(tl.int32), 1) > 0
            cell = ((unit * SPLITS + k) * TILE + token[None, :, None]) * 16 + r[None, None, :]
            mask = (k < SPLITS) & uses[None, :, None] & (r >= 0)[None, None, :]
            # Other programs wrote these: past the first-level cache, which may hold what was there before.
            total = tl.sum(tl.load(partial + cell, mask=mask, other=0.0, cache_modifier=".cg"), 0) * weight[:, None]
            row = unit % PARTS * TILE + token
            to = s + row[:, None] * s_stride + unit // PARTS * 16 + r[None, :]
            tl.store(to, tl.where(uses[:, None], total, 0.0).to(s.dtype.element_ty))
        item += tl.num_programs(0)
        slot, rows, live = _block(blocks, item, count, a, r, rank_stride, in_features, PARTS, SPLITS)
        a_tile = _load_a(rows, live, item % SPLITS * (SPAN * CHUNKS) + i, in_features)


@triton.jit
def _block(blocks, item, count, a, r, rank_stride, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """The slot of item `item`, its rows of A, and which of them there are; beyond the last block slot -2, which nobody
    has, and no rows."""
    unit = item // SPLITS
    there = unit // PARTS < count
    code = tl.load(blocks + unit // PARTS, mask=there, other=-131072)
    rows, live = _rows_of_a(a, code, unit % PARTS, r, rank_stride, in_features, PARTS)
    return code >> 16, rows, live & there


def fold(x: Tensor, a: Tensor, parts: int, rank_stride: int, tiles: LoraTiles, arrivals: Tensor, pdl: bool) -> Tensor:
    """s as above, of x [T, in_features] whose tokens are `tiles`' one tile. arrivals: int32 zeros, one a block and
    part, and zeros again afterwards."""
    most, per_row = tiles.blocks.shape[1], tiles.token_slots.shape[1]
    cut = fold_cut(tiles.tile, x.shape[1], parts, per_row, most, pdl)
    s = x.new_empty(parts * tiles.tile, cdiv(most * RANK_BLOCK, STEP) * STEP)
    partial = tiles.token_weights.new_empty(s.numel() * cut.splits)
    _fold_kernel[(cut.programs,)](
        x, a, s, partial, arrivals, tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks,
        x.shape[1], rank_stride, x.stride(0), s.stride(0), most, **cut.constants,
    )  # fmt: skip
    return s
