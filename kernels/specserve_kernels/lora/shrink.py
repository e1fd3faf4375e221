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

from specserve_kernels.language import tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.tiles import LoraTiles, tile_size

FEW_TOKENS = 256
"""Up to so many tokens reading A is what takes time, beyond it is reading x."""
_PROGRAMS = 264  # two a multiprocessor
_SPLITS_OF_MANY = 8


class ShrinkCut(NamedTuple):
    """How a first product is launched: programs a tile, splits, and the kernel's constants."""

    few: bool
    programs: int
    splits: int
    constants: Mapping[str, object]


@lru_cache(maxsize=1024)
def shrink_cut(num_tokens: int, in_features: int, parts: int, per_row: int, most_blocks: int, dtype: torch.dtype,
               pdl: bool) -> ShrinkCut:  # fmt: skip
    """Few tokens: splits of 512 to 2048 features, in flight all at once. Many: enough splits to fill the device."""
    tile, wide = tile_size(num_tokens), dtype == torch.float32
    num_tiles, precision = triton.cdiv(num_tokens, tile), "ieee" if wide else "tf32"
    few = num_tokens <= FEW_TOKENS
    common = {"M": per_row, "MP": triton.next_power_of_2(per_row), "TILE": tile, "PARTS": parts}
    common |= {"PRECISION": precision, "PDL": pdl, "num_warps": 4, "launch_pdl": pdl}
    if few:
        depth = 32 if wide else 128 if in_features > 256 else 64
        chunks = triton.cdiv(in_features, 4 * depth * 8)  # at most 8 splits
        splits = triton.cdiv(in_features, 4 * depth * chunks)
        programs = min(most_blocks * parts * splits, max(_PROGRAMS // num_tiles, 32))
        return ShrinkCut(True, programs, splits, common | {"SPLITS": splits, "DEPTH": depth, "CHUNKS": chunks})
    depth = 32 if wide else 64
    splits = min(_SPLITS_OF_MANY, max(1, _PROGRAMS // num_tiles), max(1, in_features // 256))
    span = triton.cdiv(triton.cdiv(in_features, splits), depth) * depth
    groups = triton.cdiv(most_blocks * parts, 4)
    return ShrinkCut(
        False, min(groups, 4) * splits, splits, common | {"SPLITS": splits, "SPAN": span, "DEPTH": depth, "STAGES": 4}
    )


def shrink(x: Tensor, a: Tensor, s: Tensor, rank_stride: int, tiles: LoraTiles, cut: ShrinkCut) -> None:
    """The formula above, of all tokens of `tiles`; s [splits * N * tile * M * P * R] is overwritten."""
    kernel = _shrink_few_kernel if cut.few else _shrink_many_kernel
    num_tiles, most = tiles.blocks.shape
    kernel[(cut.programs, num_tiles)](
        x, a, s, tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks,
        x.shape[0], x.shape[1], rank_stride, x.stride(0), s.shape[0] // cut.splits, most, **cut.constants,
    )  # fmt: skip


@triton.jit
def place_of(token_slots, token_weights, place, slot, M: tl.constexpr):
    """At which of the M places that begin at `place` stands `slot`, -1: at none; and what it weighs there."""
    at, weight = -1, 0.0
    for m in tl.static_range(M):
        hit = tl.load(token_slots + place + m, mask=place >= 0, other=-1) == slot
        at = tl.where(hit, m, at)
        weight = tl.where(hit, tl.load(token_weights + place + m, mask=place >= 0, other=0.0), weight)
    return at, weight


@triton.jit
def _rows_of_a(a, code, part, r, rank_stride, in_features, PARTS: tl.constexpr):
    """Pointers to rank row r of a block, and whether the adapter has it."""
    first = ((code >> 16).to(tl.int64) * PARTS + part) * rank_stride + ((code >> 8) & 255) * 16
    return a + (first + r) * in_features, r < (code & 255)


@triton.jit
def _unit(blocks, item, items, a, r, rank_stride, in_features, PARTS: tl.constexpr, SPLITS: tl.constexpr):
    """Item `item`: the code of its block, its part, its split, its rows of A; of none beyond the last one."""
    unit = item // SPLITS
    code = tl.load(blocks + unit // PARTS, mask=item < items, other=0)
    rows, live = _rows_of_a(a, code, unit % PARTS, r, rank_stride, in_features, PARTS)
    return code, unit % PARTS, item % SPLITS, rows, live


@triton.jit
def _users(token_slots, slot, tile, chunk, num_tokens, M: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr):
    """Tokens chunk * 16 … of those in the tile that have `slot`, -1 where there are no more; and how many there are."""
    token = tile * TILE + tl.arange(0, TILE)
    m = tl.arange(0, MP)[None, :]
    slots = tl.load(token_slots + token[:, None] * M + m, mask=m < M, other=-1)
    has = tl.max((slots == slot).to(tl.int32), 1)
    if TILE == 16:
        users = tl.where(has > 0, token, -1)
    else:
        order = tl.where(has > 0, tl.cumsum(has, 0) - 1, -1)
        found = order[None, :] == chunk * 16 + tl.arange(0, 16)[:, None]
        users = tl.max(tl.where(found, token[None, :], -1), 1)
    return users, tl.where(tl.sum(has, 0) > 0, TILE if TILE == 16 else tl.sum(has, 0), 0)


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
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """An item is a unit and one split of 4 * DEPTH * CHUNKS features, of which each of four warps multiplies a quarter.

    16 users of its slot at once: a decode has few of them in a tile. A's part is loaded one item ahead.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, item = tl.program_id(1), tl.program_id(0)
    blocks += tile * most
    items = tl.load(counts + tile) * (PARTS * SPLITS)
    r = tl.arange(0, 16)
    i = tl.arange(0, 4)[:, None, None] * DEPTH + tl.arange(0, DEPTH)[None, None, :]
    code, part, split, rows, live = _unit(blocks, item, items, a, r, rank_stride, in_features, PARTS, SPLITS)
    at = split * (4 * DEPTH * CHUNKS) + i
    a_tile = tl.load(rows[None, :, None] + at, mask=live[None, :, None] & (at < in_features), other=0.0)
    if PDL:
        _wait_if((item < items) | (item == 0))  # one at least: a kernel must not end before those in front of it have
    while item < items:
        first = ((code >> 8) & 255) * 16
        chunk, users = 0, 1
        while chunk * 16 < users:
            token, users = _users(token_slots, code >> 16, tile, chunk, num_tokens, M, MP, TILE)
            x_rows = x + token.to(tl.int64) * x_stride
            has = (token >= 0)[None, :, None]
            x_tile = tl.load(x_rows[None, :, None] + at, mask=has & (at < in_features), other=0.0)
            product = tl.dot(x_tile, tl.permute(a_tile, (0, 2, 1)), input_precision=PRECISION)
            for later in range(1, CHUNKS):
                next_at = at + later * (4 * DEPTH)
                x_tile = tl.load(x_rows[None, :, None] + next_at, mask=has & (next_at < in_features), other=0.0)
                mask = live[None, :, None] & (next_at < in_features)
                more = tl.load(rows[None, :, None] + next_at, mask=mask, other=0.0)
                product = tl.dot(x_tile, tl.permute(more, (0, 2, 1)), product, input_precision=PRECISION)
            place = tl.where(token >= 0, token * M, -1)[:, None]
            m, weight = place_of(token_slots, token_weights, place, code >> 16, M)
            s_rows = s + split * split_stride + ((place + m) * PARTS + part) * rank_stride + first
            tl.store(s_rows + r[None, :], tl.sum(product, 0) * weight, mask=(m >= 0) & (r >= 0)[None, :])
            chunk += 1
        item += tl.num_programs(0)
        code, part, split, rows, live = _unit(blocks, item, items, a, r, rank_stride, in_features, PARTS, SPLITS)
        at = split * (4 * DEPTH * CHUNKS) + i
        a_tile = tl.load(rows[None, :, None] + at, mask=live[None, :, None] & (at < in_features), other=0.0)


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
        place = token[:, None] * M
        m, weight = place_of(token_slots, token_weights, place, tl.where(unit < units, code >> 16, -2)[None, :], M)
        rank = ((code >> 8) & 255) * 16 + lane % 16
        s_rows = s + split * split_stride + (place + m) * (PARTS * rank_stride)
        tl.store(s_rows + ((unit % PARTS) * rank_stride + rank)[None, :], product * weight, mask=m >= 0)
        item += tl.num_programs(0)
