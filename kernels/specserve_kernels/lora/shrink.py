"""The first half of a grouped LoRA: the activations times the A of each token's adapters, cut along in_features.

    s[k, token, m, p, r] = weight[token, m] · Σ_{i in split k} x[token, i] · a[(slot * P + p) * R + r, i]

for the slot at place m of the token (see `LoraTiles`) and every part p of P. x [T, in_features] and a [S * P * R,
in_features] in the model's dtype, R a multiple of 16; s float32 [splits, N * tile, M, P, R], written only where a token
has a slot, up to the slot's rank rounded up to 16. The second half adds the splits in order, which keep a small
batch's reading of A in many programs. a's rows beyond a rank are not read.

Work is handed out in units, a rank block of one part, of the blocks that are live: a graph captured for many slots
costs what those in use cost. A program takes every so many of them. What it needs of A and of the tiles was there
before the kernel in front of it began: it reads that before it waits for x (see overlap).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.tiles import LoraTiles, tile_size

FEW_TOKENS = 256
"""Up to so many tokens reading A is what takes time, beyond it is reading x."""
_PROGRAMS = 264  # two a multiprocessor
_USERS = tl.constexpr(16)  # tokens that are multiplied together: the least that the tensor cores take


class ShrinkCut(NamedTuple):
    """How a first product is launched: programs a tile, splits, and the kernel's constants."""

    few: bool
    programs: int
    splits: int
    constants: Mapping[str, object]


@lru_cache(maxsize=1024)
def shrink_cut(num_tokens: int, in_features: int, parts: int, per_row: int, most_blocks: int, dtype: torch.dtype,
               pdl: bool) -> ShrinkCut:  # fmt: skip
    """Few tokens: splits of 512 or 1024 features, in flight all at once. Many: enough splits to fill the device."""
    tile, wide = tile_size(num_tokens), dtype == torch.float32
    num_tiles, precision = cdiv(num_tokens, tile), "ieee" if wide else "tf32"
    common: dict[str, object] = {"M": per_row, "MP": power_of_2(per_row), "TILE": tile, "PARTS": parts}
    common |= {"PRECISION": precision, "PDL": pdl, "launch_pdl": pdl}
    if num_tokens <= FEW_TOKENS:
        warps = 4 if num_tokens <= 32 else 8
        depth = 32 if wide else 128 if in_features > 256 else 64
        most = 16 if num_tokens <= 32 else 8
        chunks = cdiv(in_features, warps * depth * most)
        splits = cdiv(in_features, warps * depth * chunks)
        programs = min(most_blocks * parts * splits, max(_PROGRAMS // num_tiles, 64))
        own: dict[str, object] = {"SPLITS": splits, "DEPTH": depth, "CHUNKS": chunks, "WARPS": warps, "num_warps": warps}
        return ShrinkCut(True, programs, splits, common | own)
    depth = 32 if wide else 64
    splits = min(8, max(1, _PROGRAMS // num_tiles), max(1, in_features // 256))
    span = cdiv(cdiv(in_features, splits), depth) * depth
    programs = min(cdiv(most_blocks * parts, 4), 4) * splits
    own = {"SPLITS": splits, "SPAN": span, "DEPTH": depth, "STAGES": 4, "num_warps": 4}
    return ShrinkCut(False, programs, splits, common | own)


def shrink(x: Tensor, a: Tensor, s: Tensor, rank_stride: int, tiles: LoraTiles, cut: ShrinkCut) -> None:
    """The formula above, of all tokens of `tiles`; s [splits * N * tile * M * P * R] is overwritten."""
    kernel = _shrink_few_kernel if cut.few else _shrink_many_kernel
    num_tiles, most = tiles.blocks.shape
    kernel[(cut.programs, num_tiles)](
        x, a, s, tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks,
        x.shape[0], x.shape[1], rank_stride, x.stride(0), s.shape[0] // cut.splits, most, **cut.constants,
    )  # fmt: skip


@triton.jit
def _rows_of_a(a, code, part, r, rank_stride, in_features, PARTS: tl.constexpr):
    """Pointers to rank row r of a block, and whether the adapter has it."""
    first = ((code >> 16).to(tl.int64) * PARTS + part) * rank_stride + ((code >> 8) & 255) * 16
    return a + (first + r) * in_features, r < (code & 255)


@triton.jit
def _unit(blocks, item, items, a, r, rank_stride, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """Item `item`: its slot, the first of its numbers in a row of s, its split, its rows of A; of none beyond the last
    item slot -2."""
    unit = item // SPLITS
    code = tl.load(blocks + unit // PARTS, mask=item < items, other=-512)
    rows, live = _rows_of_a(a, code, unit % PARTS, r, rank_stride, in_features, PARTS)
    first = unit % PARTS * rank_stride + ((code >> 8) & 255) * 16
    return tl.where(item < items, code >> 16, -2), first, item % SPLITS, rows, live & (item < items)


@triton.jit
def _load_a(rows, live, at, in_features):
    """[WARPS, 16, DEPTH] of A."""
    return tl.load(rows[None, :, None] + at, mask=live[None, :, None] & (at < in_features), other=0.0)


@triton.jit
def _load_x(x, token, x_stride, at, in_features):
    """[WARPS, users, DEPTH] of x."""
    rows = x + token.to(tl.int64) * x_stride
    return tl.load(rows[None, :, None] + at, mask=(token >= 0)[None, :, None] & (at < in_features), other=0.0)


@triton.jit
def _users(token_slots, token_weights, slot, tile, chunk, M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr):
    """Of the tokens of a tile that have `slot` the chunk-th 16: [16], -1 where there are no more; their places of it
    [16, 1] in [N * tile * M], -1 for none, and weights; and how many there are in all, if more are to come."""
    token = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, MP)[None, :]
    if TILE == _USERS:
        user, count = token, 0
    else:
        slots = tl.load(token_slots + token[:, None] * M + m, mask=m < M, other=-1)
        has = tl.max((slots == slot).to(tl.int32), 1)
        order, count = tl.where(has > 0, tl.cumsum(has, 0) - 1, -1), tl.sum(has, 0)
        found = order[None, :] == chunk * _USERS + tl.arange(0, _USERS)[:, None]
        user = tl.max(tl.where(found, token[None, :], -1), 1)
    inside = (user >= 0)[:, None] & (m < M)
    hit = tl.load(token_slots + user[:, None] * M + m, mask=inside, other=-1) == slot
    weight = tl.load(token_weights + user[:, None] * M + m, mask=inside & hit, other=0.0)
    place = tl.max(tl.where(hit, user[:, None] * M + m, -1), 1)
    return tl.where(place >= 0, user, -1), place[:, None], tl.sum(weight, 1)[:, None], count


@triton.jit
def _wait_if(needed):
    if needed:
        tl.extra.cuda.gdc_wait()


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"])
def _shrink_few_kernel(
    x, a, s, token_slots, token_weights, counts, blocks,
    num_tokens, in_features, rank_stride, x_stride, split_stride, most,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An item is a unit and one split of WARPS * DEPTH * CHUNKS features: each warp multiplies its own.

    Only users of its slot are multiplied, of which a tile of a decode has few. A is loaded one item ahead.
    """
    SPAN: tl.constexpr = WARPS * DEPTH
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, item = tl.program_id(1), tl.program_id(0)
    blocks += tile * most
    items = tl.load(counts + tile) * (PARTS * SPLITS)
    r = tl.arange(0, 16)
    i = tl.arange(0, WARPS)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    slot, first, split, rows, live = _unit(blocks, item, items, a, r, rank_stride, in_features, PARTS, SPLITS)
    a_tile = _load_a(rows, live, split * (SPAN * CHUNKS) + i, in_features)
    token, place, weight, users = _users(token_slots, token_weights, slot, tile, 0, M, MP, TILE)
    if PDL:
        _wait_if((item < items) | (item == 0))  # one at least: a kernel must not end before those in front of it have
    while item < items:
        at = split * (SPAN * CHUNKS) + i
        x_tile = _load_x(x, token, x_stride, at, in_features)
        item += tl.num_programs(0)
        next_slot, next_first, next_split, next_rows, next_live = _unit(
            blocks, item, items, a, r, rank_stride, in_features, PARTS, SPLITS
        )
        next_a = _load_a(next_rows, next_live, next_split * (SPAN * CHUNKS) + i, in_features)
        chunk, users = 0, tl.maximum(users, 1)
        while chunk * _USERS < users:
            if chunk > 0:
                token, place, weight, _ = _users(token_slots, token_weights, slot, tile, chunk, M, MP, TILE)
                x_tile = _load_x(x, token, x_stride, at, in_features)
            product = tl.dot(x_tile, tl.permute(a_tile, (0, 2, 1)), input_precision=PRECISION)
            for later in tl.range(1, CHUNKS, num_stages=1):
                x_tile = _load_x(x, token, x_stride, at + later * SPAN, in_features)
                more = _load_a(rows, live, at + later * SPAN, in_features)
                product = tl.dot(x_tile, tl.permute(more, (0, 2, 1)), product, input_precision=PRECISION)
            s_rows = s + split * split_stride + place * (PARTS * rank_stride) + first
            tl.store(s_rows + r[None, :], tl.sum(product, 0) * weight, mask=(place >= 0) & (r >= 0)[None, :])
            chunk += 1
        slot, first, split, rows, live, a_tile = next_slot, next_first, next_split, next_rows, next_live, next_a
        token, place, weight, users = _users(token_slots, token_weights, slot, tile, 0, M, MP, TILE)


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"])
def _shrink_many_kernel(
    x, a, s, token_slots, token_weights, counts, blocks,
    num_tokens, in_features, rank_stride, x_stride, split_stride, most,
    M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    SPAN: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An item is four units and one split of SPAN features: x is read once for 64 rows of A."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, item = tl.program_id(1), tl.program_id(0)
    units = tl.load(counts + tile) * PARTS
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tile * TILE + tl.arange(0, TILE)
    lane, depth = tl.arange(0, 64), tl.arange(0, DEPTH)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    while item < tl.cdiv(units, 4) * SPLITS:
        split, unit = item % SPLITS, item // SPLITS * 4 + lane // 16
        code = tl.load(blocks + tile * most + unit // PARTS, mask=unit < units, other=0)
        a_rows, live = _rows_of_a(a, code, unit % PARTS, lane % 16, rank_stride, in_features, PARTS)
        product = tl.zeros([TILE, 64], tl.float32)
        for offset in tl.range(0, SPAN, DEPTH, num_stages=STAGES):
            i = split * SPAN + offset + depth
            x_mask = (token < num_tokens)[:, None] & (i < in_features)[None, :]
            x_tile = tl.load(x_rows + i[None, :], mask=x_mask, other=0.0)
            a_mask = live[:, None] & (i < in_features)[None, :]
            a_tile = tl.load(a_rows[:, None] + i[None, :], mask=a_mask, other=0.0)
            product = tl.dot(x_tile, tl.trans(a_tile), product, input_precision=PRECISION)
        first = unit % PARTS * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
        for m in tl.static_range(M):
            place, slot = token[:, None] * M + m, tl.where(unit < units, code >> 16, -2)[None, :]
            to = s + split * split_stride + place * (PARTS * rank_stride) + first[None, :]
            weight = tl.load(token_weights + place)
            tl.store(to, product * weight, mask=tl.load(token_slots + place) == slot)
        item += tl.num_programs(0)
