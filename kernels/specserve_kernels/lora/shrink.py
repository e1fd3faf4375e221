"""The first half of a grouped LoRA: the activations times the A of each token's adapters.

    s[token, slot, p, r] = weight[token, slot] · Σ_i x[token, i] · a[(slot * P + p) * R + r, i]

for every slot of the token (see `LoraTiles`) and every part p of P. x [T, in_features] and a [S * P * R, in_features]
in the model's dtype, R a multiple of 16; a's rows beyond a rank are not read. s is summed in float32 and rounded once,
to the dtype in which the second half multiplies. It lies in one of two ways:

    dense    [N, P, tile, K]: column 16 j + i is rank i of the tile's j-th block; zeros for the tokens that do not use
             the block, and up to a multiple of 64 columns. Of few tokens, whose tiles use many slots: who reads s
             reads whole rows.
    compact  [N * tile, M, P, R], by the place of the slot among the token's; written only where a token has a slot, up
             to its rank rounded up to 16. Of many tokens, where the dense form would take much memory.

Work is handed out in groups, four rank blocks of one part, of those that are live: a graph captured for many slots
costs what those in use cost. All tokens of a tile are multiplied with a group, with tensor cores, whether or not they
use it: that takes less time than to read A, and no token is looked up. Products are parted along in_features, to have
many programs read at once; the one that is done last with a group adds the parts, in their order, so that the result
does not depend on who was last, and sets the group's counter back to 0. What a program needs of A and of the tiles was
there before the kernel in front of it began: it reads that before it waits for x (see overlap).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.tiles import RANK_BLOCK, LoraTiles, tile_size

FEW_TOKENS = 256
"""Up to so many tokens s is dense, and reading A is what takes time; beyond it is reading x."""
GROUP = 4
"""Rank blocks that are multiplied together."""
_COLUMNS = tl.constexpr(64)
_PROGRAMS = 264  # two a multiprocessor


def shrink_ref(x: Tensor, a: Tensor, parts: int, rank_stride: int, tiles: LoraTiles) -> Tensor:
    """Dense s block by block in float64, on the CPU: [N, P, tile, ranks of the fullest tile's blocks]."""
    x, a, counts, blocks, token_slots, token_weights = (
        tensor.cpu() for tensor in (x, a, tiles.counts, tiles.blocks, tiles.token_slots, tiles.token_weights)
    )
    s = torch.zeros(len(counts), parts, tiles.tile, int(counts.max()) * RANK_BLOCK, dtype=torch.float64)
    for tile, count in enumerate(counts.tolist()):
        begin, end = tile * tiles.tile, min((tile + 1) * tiles.tile, len(x))
        for j, code in enumerate(blocks[tile, :count].tolist()):
            slot, first, ranks = code >> 16, (code >> 8 & 255) * RANK_BLOCK, code & 255
            weight = (token_weights[begin:end] * (token_slots[begin:end] == slot)).sum(1)[:, None]
            for part in range(parts):
                row = (slot * parts + part) * rank_stride + first
                shrunk = x[begin:end].double() @ a[row : row + ranks].double().t() * weight
                s[tile, part, : end - begin, j * RANK_BLOCK : j * RANK_BLOCK + ranks] = shrunk
    return s


class ShrinkCut(NamedTuple):
    """How a shrink is launched: whether s is dense, the shape of s, how many floats one of the parts takes that
    are to be added, how many there are, programs a tile, and the kernel's last numbers and its constants.

    The number of tokens decides about numbers, and about few constants: each other one is another kernel to compile."""

    dense: bool
    shape: tuple[int, ...]
    part_size: int
    splits: int
    programs: int
    numbers: tuple[int, ...]
    constants: Mapping[str, object]


@lru_cache(maxsize=1024)
def shrink_cut(
    num_tokens: int, in_features: int, parts: int, per_row: int, most_blocks: int, rank_stride: int,
    dtype: torch.dtype, pdl: bool,
) -> ShrinkCut:  # fmt: skip
    """Few tokens: up to 32 parts, and as many programs as the device holds at once. Many: enough to fill it."""
    tile, wide = tile_size(num_tokens), dtype == torch.float32
    num_tiles, groups = cdiv(num_tokens, tile), cdiv(most_blocks, GROUP) * parts
    dense = num_tokens <= FEW_TOKENS
    constants: dict[str, object] = {"M": per_row, "TILE": tile, "PARTS": parts, "PDL": pdl, "launch_pdl": pdl}
    constants["PRECISION"] = "ieee" if wide else "tf32"
    if dense:
        depth, large = 32 if wide else min(128, max(64, power_of_2(in_features))), tile == 64
        chunks = max(cdiv(in_features, depth * 32), (4 if large else 2) if in_features >= 16 * depth else 1)
        splits, lanes = cdiv(in_features, depth * chunks), _PROGRAMS
        constants |= {"CHUNKS": chunks, "num_warps": 4 if large else 8}
    else:
        depth, lanes = 32 if wide else 64, 4 * _PROGRAMS
        splits = min(8, max(1, _PROGRAMS // num_tiles), max(1, in_features // 256))
        splits = 1 << (splits.bit_length() - 1)
        span = cdiv(cdiv(in_features, splits), depth) * depth
        splits = cdiv(in_features, span)
        constants |= {"STAGES": 4, "num_warps": 4}
    lanes = min(groups, max(1 if dense else 4, lanes // (num_tiles * splits)))
    constants |= {"SPLITS": splits, "DEPTH": depth}
    numbers = (lanes,) if dense else (lanes, span)
    places = (num_tiles * tile, per_row, parts, rank_stride)
    shape = (num_tiles, parts, tile, cdiv(most_blocks * RANK_BLOCK, 128) * 128) if dense else places
    part_size = places[0] * per_row * parts * rank_stride
    return ShrinkCut(dense, shape, part_size, splits, lanes * splits, numbers, constants)


def arrivals_of(num_tiles: int, parts: int, most_blocks: int) -> int:
    """How many arrivals `shrink` counts: one a tile, part and group."""
    return num_tiles * parts * cdiv(most_blocks, GROUP)


def shrink(x: Tensor, a: Tensor, rank_stride: int, tiles: LoraTiles, arrivals: Tensor, cut: ShrinkCut) -> Tensor:
    """s as above, of all tokens of `tiles`. arrivals [counters]: int32 zeros, and zeros again afterwards."""
    num_tiles, most = tiles.blocks.shape
    s = x.new_empty(cut.shape, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    partial = tiles.token_weights.new_empty(cut.splits * cut.part_size) if cut.splits > 1 else None
    kernel = _shrink_few_kernel if cut.dense else _shrink_many_kernel
    kernel[(cut.programs, num_tiles)](
        x, a, s, partial, arrivals, tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks,
        x.shape[0], x.shape[1], rank_stride, x.stride(0), cut.shape[-1], cut.part_size, most, *cut.numbers,
        **cut.constants,
    )  # fmt: skip
    return s


@triton.jit
def _group(a, blocks, count, group, token_slots, token, rank_stride, in_features,
           M: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Of the group's 64 rows of A pointers [64] and whether the adapters have them [64]; where in a row of s its four
    blocks begin [4], and the tokens' places of their slots in [N * tile * M] [TILE, 4], -1 for none."""
    lane, block = tl.arange(0, _COLUMNS), group // PARTS * (_COLUMNS // 16)
    code = tl.load(blocks + block + lane // 16, mask=block + lane // 16 < count, other=-131072)  # of slot -2: nobody's
    row = ((code >> 16).to(tl.int64) * PARTS + group % PARTS) * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
    rows, live = a + row * in_features, lane % 16 < (code & 255)
    j = block + tl.arange(0, _COLUMNS // 16)
    code = tl.load(blocks + j, mask=j < count, other=-131072)
    place = tl.full([TILE, _COLUMNS // 16], -1, tl.int32)
    for m in tl.static_range(M):
        slot = tl.load(token_slots + token * M + m)
        place = tl.where(slot[:, None] == (code >> 16)[None, :], (token * M + m)[:, None], place)
    return rows, live, group % PARTS * rank_stride + ((code >> 8) & 255) * 16, place


@triton.jit
def _write(total, s, token_weights, tile, group, begin, place, s_stride, rank_stride,
           TILE: tl.constexpr, PARTS: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """s of a group from its sums [TILE, 4, 16]: by the tile's blocks, or by the tokens' places."""
    r, mask = tl.arange(0, 16)[None, None, :], (place >= 0)[:, :, None]
    weight = tl.load(token_weights + place, mask=place >= 0, other=0.0)
    total = tl.where(mask, total * weight[:, :, None], 0.0).to(s.dtype.element_ty)
    if DENSE:
        row = (tile * PARTS + group % PARTS) * TILE + tl.arange(0, TILE)
        column = group // PARTS * _COLUMNS + tl.arange(0, _COLUMNS // 16) * 16
        tl.store(s + row[:, None, None] * s_stride + column[None, :, None] + r, total)
    else:
        tl.store(s + place[:, :, None] * (PARTS * rank_stride) + begin[None, :, None] + r, total, mask=mask & (r >= 0))


@triton.jit
def _tell(ready):
    """One group's s more is there."""
    if ready is not None:
        tl.debug_barrier()  # all threads' s is written before one of them says so
        tl.atomic_add(ready, 1, sem="release", scope="gpu")


@triton.jit
def _finish(product, s, partial, arrivals, ready, token_weights, tile, split, group, begin, place,
            s_stride, rank_stride, part_size, most,
            TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """Keep the product [TILE, 64] of one split; the last program of the group adds all and writes s."""
    total = tl.reshape(product, [TILE, _COLUMNS // 16, 16])
    if SPLITS == 1:
        _write(total, s, token_weights, tile, group, begin, place, s_stride, rank_stride, TILE, PARTS, DENSE)
        _tell(ready)
    else:
        r = tl.arange(0, 16)[None, None, :]
        mask = (place >= 0)[:, :, None] & (r >= 0)
        cell = partial + (place[:, :, None] * (PARTS * rank_stride) + begin[None, :, None] + r)
        tl.store(cell + split * part_size, total, mask=mask)
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        counter = arrivals + tile * (tl.cdiv(most, _COLUMNS // 16) * PARTS) + group
        if tl.atomic_add(counter, 1) == SPLITS - 1:
            tl.store(counter, 0)  # ready for the next linear
            total = tl.zeros([TILE, _COLUMNS // 16, 16], tl.float32)
            for k in tl.range(0, SPLITS, 4):
                for j in tl.static_range(4):  # on their way together
                    # Other programs wrote these: past the first-level cache, which may hold what was there before.
                    at, there = cell + (k + j) * part_size, mask & (k + j < SPLITS)
                    total += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            _write(total, s, token_weights, tile, group, begin, place, s_stride, rank_stride, TILE, PARTS, DENSE)
            _tell(ready)


@triton.jit
def _wait_if(needed):
    if needed:
        tl.extra.cuda.gdc_wait()


@triton.jit
def shrink_few(
    x, a, s, partial, arrivals, ready, token_slots, token_weights, counts, blocks, program, tile,
    num_tokens, in_features, rank_stride, x_stride, s_stride, part_size, most, lanes,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split, DEPTH * CHUNKS features of x, times every `lanes`-th group. ready: None, or counts the groups whose s
    is there, for whoever waits in the same launch."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    split, group = program % SPLITS, program // SPLITS
    count, blocks = tl.load(counts + tile), blocks + tile * most
    groups = tl.cdiv(count, _COLUMNS // 16) * PARTS
    token = tile * TILE + tl.arange(0, TILE)
    i = split * (DEPTH * CHUNKS) + tl.arange(0, DEPTH)[None, :]
    rows, live, begin, place = _group(
        a, blocks, count, group, token_slots, token, rank_stride, in_features, M, PARTS, TILE
    )
    a_tile = tl.load(rows[:, None] + i, mask=live[:, None] & (i < in_features), other=0.0)
    if PDL:
        _wait_if((group < groups) | (program == 0))  # one at least: it ends after those in front of it
    x_rows, there = x + token.to(tl.int64)[:, None] * x_stride, (token < num_tokens)[:, None]
    x_tile = tl.load(x_rows + i, mask=there & (i < in_features) & (group < groups), other=0.0)
    while group < groups:
        product = tl.dot(x_tile, tl.trans(a_tile), input_precision=PRECISION)
        for chunk in tl.range(1, CHUNKS, num_stages=STAGES):
            at = i + chunk * DEPTH
            more_x = tl.load(x_rows + at, mask=there & (at < in_features), other=0.0)
            more_a = tl.load(rows[:, None] + at, mask=live[:, None] & (at < in_features), other=0.0)
            product = tl.dot(more_x, tl.trans(more_a), product, input_precision=PRECISION)
        _finish(product, s, partial, arrivals, ready, token_weights, tile, split, group, begin, place,
                s_stride, rank_stride, part_size, most, TILE, PARTS, SPLITS, True)  # fmt: skip
        group += lanes
        rows, live, begin, place = _group(
            a, blocks, count, group, token_slots, token, rank_stride, in_features, M, PARTS, TILE
        )
        a_tile = tl.load(rows[:, None] + i, mask=live[:, None] & (i < in_features), other=0.0)


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most", "lanes"])
def _shrink_few_kernel(
    x, a, s, partial, arrivals, token_slots, token_weights, counts, blocks,
    num_tokens, in_features, rank_stride, x_stride, s_stride, part_size, most, lanes,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    shrink_few(x, a, s, partial, arrivals, None, token_slots, token_weights, counts, blocks,
               tl.program_id(0), tl.program_id(1),
               num_tokens, in_features, rank_stride, x_stride, s_stride, part_size, most, lanes,
               M, TILE, PARTS, SPLITS, DEPTH, CHUNKS, 1, PRECISION, PDL)  # fmt: skip


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most", "lanes"])
def _shrink_many_kernel(
    x, a, s, partial, arrivals, token_slots, token_weights, counts, blocks,
    num_tokens, in_features, rank_stride, x_stride, s_stride, part_size, most, lanes, span,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of `span` features times every `lanes`-th group: x is read once for 64 rows of A."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split, group = tl.program_id(1), tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    count, blocks = tl.load(counts + tile), blocks + tile * most
    if PDL:
        tl.extra.cuda.gdc_wait()
    token, depth = tile * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)[None, :]
    x_rows, there = x + token.to(tl.int64)[:, None] * x_stride, (token < num_tokens)[:, None]
    while group < tl.cdiv(count, _COLUMNS // 16) * PARTS:
        rows, live, begin, place = _group(
            a, blocks, count, group, token_slots, token, rank_stride, in_features, M, PARTS, TILE
        )
        product = tl.zeros([TILE, _COLUMNS], tl.float32)
        for offset in tl.range(0, span, DEPTH, num_stages=STAGES):
            i = split * span + offset + depth
            x_tile = tl.load(x_rows + i, mask=there & (i < in_features), other=0.0)
            a_tile = tl.load(rows[:, None] + i, mask=live[:, None] & (i < in_features), other=0.0)
            product = tl.dot(x_tile, tl.trans(a_tile), product, input_precision=PRECISION)
        _finish(product, s, partial, arrivals, None, token_weights, tile, split, group, begin, place,
                s_stride, rank_stride, part_size, most, TILE, PARTS, SPLITS, False)  # fmt: skip
        group += lanes
