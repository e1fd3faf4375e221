"""Products of a few rows with codes that take adapters into themselves: y = x Wᵀ + Σ s·B in one launch.

    s = weight · x Aᵀ, dense, of the rank blocks that the tokens use (see lora.shrink); the rest as in quantised_rows

The first programs multiply x by A and count in `ready` the groups of s that are there. The others stream W; those with
the last part of `in` then wait for all groups and add s·B to their sums, of which the first ranks' B was loaded before
W was. They can wait: the first programs have the lowest numbers, so they have begun before any of the others, and wait
for nobody. To a token other tokens' adapters are zeros in s, which leave its sums as they are.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.expand import load_b, load_s, s_by_b
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import SlotFactors
from specserve_kernels.lora.shrink import GROUP, shrink_few
from specserve_kernels.lora.tiles import RANK_BLOCK
from specserve_kernels.overlap import overlaps, wait
from specserve_kernels.skinny import quantised_rows
from specserve_kernels.skinny.codes import Coded
from specserve_kernels.skinny.linear import Cut, weight_rows
from specserve_kernels.skinny.quantised_rows import add_parts, first_codes, multiply, part_of, write

MOST_ROWS = 64
"""Rows up to which these products take adapters."""
_WIDE = 64  # rows of W in a tile, of which each part of a merged linear has whole ones
_RANKS = tl.constexpr(64)
_FOLDS, _MANY_FOLDS = 64, 132  # programs that multiply by A, where adapters are few and where they are many


@triton.jit
def _wait_for(ready, groups):
    """Until so many groups of s are there."""
    there = 0
    while there < groups:
        there = tl.atomic_add(ready, 0, sem="acquire", scope="gpu")


@triton.jit
def _first_b(b, blocks, count, column, inside, rank_stride, out_dim, GATED: tl.constexpr):
    """B of the first ranks [_RANKS, columns]; gated: of gates, and of what they multiply."""
    stride = 2 * out_dim if GATED else out_dim
    first = load_b(b, blocks, count, 0, column, inside, count, rank_stride, stride, _RANKS, tl.bfloat16)
    second = first
    if GATED:
        second = load_b(b, blocks, count, 0, out_dim + column, inside, count, rank_stride, stride, _RANKS, tl.bfloat16)
    return first, second


@triton.jit
def _delta(first, s, b, token_slots, blocks, count, part, column, inside, rank_stride, s_stride, b_stride,
           M: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Σ s·B [columns, TOKENS] at these columns, all of one part, whose B of the first ranks is `first`."""
    shrunk = load_s(s, token_slots, 1.0, blocks, count, 0, 0, part, count, rank_stride, s_stride, M, TOKENS, PARTS,
                    _RANKS, "dense")  # fmt: skip
    delta = s_by_b(shrunk, first, s, b, token_slots, None, blocks, count, 0, part, column, inside, count, rank_stride,
                   s_stride, b_stride, M, TOKENS, PARTS, _RANKS, _RANKS, "dense", tl.bfloat16, "tf32")  # fmt: skip
    return tl.trans(delta)


@triton.jit
def _add_adapters(y, first, second, s, b, token_slots, blocks, count, part, column, inside, rank_stride, s_stride,
                  out_dim, M: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """y + Σ s·B of W's tile [BN, TOKENS], whose rows are, gated, a gate's and its partner's in turn."""
    TOKENS: tl.constexpr = y.shape[1]
    if GATED:
        gate = _delta(first, s, b, token_slots, blocks, count, 0, column, inside, rank_stride, s_stride, 2 * out_dim,
                      M, TOKENS, PARTS)  # fmt: skip
        up = _delta(second, s, b, token_slots, blocks, count, PARTS - 1, out_dim + column, inside, rank_stride,
                    s_stride, 2 * out_dim, M, TOKENS, PARTS)  # fmt: skip
        delta = tl.reshape(tl.trans(tl.join(gate, up), 0, 2, 1), (y.shape[0], TOKENS))
    else:
        delta = _delta(first, s, b, token_slots, blocks, count, part, column, inside, rank_stride, s_stride, out_dim,
                       M, TOKENS, PARTS)  # fmt: skip
    return y + delta


@triton.jit
def _product(
    x, w, scales, out, workspace, arrivals, b, s, ready, token_slots, counts, blocks, program,
    count, in_dim, out_dim, x_stride, out_stride, parts_stride, rank_stride, s_stride, second, third, fourth,
    BN: tl.constexpr, BK: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """quantised_rows' program for one tile of x, and the adapters' share."""
    COLUMNS: tl.constexpr = BN // 2 if GATED else BN
    tile, part = program // SPLITS, program % SPLITS
    rows, token = weight_rows(tl.arange(0, BN), tile, out_dim, BN, GATED), tl.arange(0, TOKENS)
    begin, end = part_of(part, in_dim, BK, SPLITS)
    codes = first_codes(w, rows, begin, end, in_dim, BK)
    scale = tl.load(scales + rows)
    live = tl.load(counts)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (column < out_dim) & (part == SPLITS - 1)
    b_first, b_second = _first_b(b, blocks, live, column, inside, rank_stride, out_dim, GATED)
    wait(PDL)
    y = multiply(codes, x, w, rows, token, begin, end, count, in_dim, x_stride, BK, STAGES, "tf32") * scale[:, None]
    if part == SPLITS - 1:
        _wait_for(ready, tl.cdiv(live, 4) * PARTS)
        at = tile * COLUMNS
        linear = (at >= second).to(tl.int32) + (at >= third).to(tl.int32) + (at >= fourth).to(tl.int32)
        y = _add_adapters(y, b_first, b_second, s, b, token_slots, blocks, live, linear, column, inside, rank_stride,
                          s_stride, out_dim, M, PARTS, GATED)  # fmt: skip
    last = True
    if SPLITS > 1:
        share = workspace + tile.to(tl.int64) * (BN * TOKENS)
        y, last = add_parts(y, share, arrivals + tile, part, parts_stride, SPLITS)
    if last:
        write(y, out, tile, token, count, out_dim, out_stride, BN, TOKENS, GATED, RESIDUAL)


@relaunched
@triton.jit(do_not_specialize=["count", "most", "lanes"], do_not_specialize_on_alignment=["fold_arrivals", "ready"])
def _rows_lora_kernel(
    x, w, scales, out, workspace, arrivals, a, b, s, partial, fold_arrivals, ready, token_slots, token_weights, counts,
    blocks, count, in_dim, out_dim, x_stride, out_stride, parts_stride, rank_stride, s_stride, fold_stride, most,
    lanes, second, third, fourth,
    BN: tl.constexpr, BK: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr, CUTS: tl.constexpr,
    DEPTH: tl.constexpr, CHUNKS: tl.constexpr, FOLD_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first lanes * CUTS programs compute s, the others are those of the product. fold_stride: fp32 of a part of
    s, as parts_stride of y."""
    program = tl.program_id(0)
    if program < lanes * CUTS:
        shrink_few(x, a, s, partial, fold_arrivals, ready, token_slots, token_weights, counts, blocks, program, 0,
                   count, in_dim, rank_stride, x_stride, s_stride, fold_stride, most,
                   lanes, M, TOKENS, PARTS, CUTS, DEPTH, CHUNKS, FOLD_STAGES, "tf32", PDL)  # fmt: skip
    else:
        _product(x, w, scales, out, workspace, arrivals, b, s, ready, token_slots, counts, blocks,
                 program - lanes * CUTS, count, in_dim, out_dim, x_stride, out_stride, parts_stride, rank_stride,
                 s_stride, second, third, fourth,
                 BN, BK, TOKENS, SPLITS, STAGES, GATED, RESIDUAL, M, PARTS, PDL)  # fmt: skip


@lru_cache(maxsize=1024)
def choose_fold(groups: int, in_dim: int, tokens: int, *, many: bool) -> tuple[int, Cut]:
    """How many lanes work at the `groups` that a batch may use, and how a group is multiplied by A: in CUTS of CHUNKS
    times DEPTH columns, of which the first DEPTH are loaded ahead of x. As many lanes as are done before W was read,
    and no more: they come before W's programs. How many groups a batch uses only the device knows."""
    depth = 128 if tokens <= 16 else 64
    cuts = max(1, min(16, in_dim // 256))
    chunks = cdiv(in_dim, depth * cuts)
    cuts = cdiv(in_dim, depth * chunks)
    lanes = max(1, min(groups, (_MANY_FOLDS if many else _FOLDS) // cuts))
    stages = 3 if tokens <= 16 else 2
    return lanes, {"CUTS": cuts, "DEPTH": depth, "CHUNKS": chunks, "FOLD_STAGES": stages}


def _registers(tokens: int, chunks: int) -> int:
    """Of a thread, as many as leave a multiprocessor the programs that its shared memory allows."""
    if tokens <= 16:
        return 128 if chunks <= 2 else 168
    return 168 if tokens <= 32 else 255


def choose_cut(rows: int, out_rows: int, in_dim: int) -> Cut:
    """quantised_rows', with the tiles that parts are whole ones of."""
    return {**quantised_rows.choose_cut(rows, out_rows, in_dim), "BN": _WIDE}


def fits(x: Tensor, weight: Coded, factors: SlotFactors) -> bool:
    """Whether these products can take these adapters. Not in float16, where s might overflow."""
    whole = all(width % _WIDE == 0 for width in factors.widths) and factors.b.shape[1] == weight.codes.shape[0]
    kinds = x.dtype == factors.a.dtype == factors.b.dtype == torch.bfloat16
    return x.shape[0] <= MOST_ROWS and kinds and whole and factors.a.is_contiguous() and factors.b.is_contiguous()


def quantised_lora_triton(
    x: Tensor,
    weight: Coded,
    lora: Folded,
    residual: Tensor | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """quantised_rows_triton of x [rows, in], of which `fits` must hold, plus what the adapters add, before the gate."""
    (rows, in_dim), (codes, scales), tiles = x.shape, weight, lora.tiles
    out_dim = codes.shape[0] // 2 if gated else codes.shape[0]
    assert not gated or lora.widths in ((out_dim, out_dim), (2 * out_dim,)), lora.widths
    out = x.new_empty(rows, out_dim) if residual is None else residual
    cut = choose_cut(rows, codes.shape[0], in_dim) if cut is None else cut
    tokens, splits = cut["TOKENS"], 1 if arrivals is None else cut["SPLITS"]
    programs, per_row, parts = cdiv(codes.shape[0], cut["BN"]), tiles.token_slots.shape[1], len(lora.widths)
    assert rows <= tokens <= tiles.token_slots.shape[0] and tiles.counts.shape[0] == 1, (rows, tokens, tiles)
    assert splits == 1 or (arrivals is not None and arrivals.numel() >= programs), programs
    part = programs * cut["BN"] * tokens
    workspace = scales if splits == 1 else scales.new_empty(splits * part)
    most = tiles.blocks.shape[1]
    lanes, fold = choose_fold(cdiv(most, GROUP) * parts, in_dim, tokens, many=lora.many)
    s = x.new_empty(parts, tokens, cdiv(most, GROUP) * GROUP * RANK_BLOCK)
    fold_part = tokens * per_row * parts * lora.rank_stride
    partial = scales.new_empty(fold["CUTS"] * fold_part)
    starts = [*accumulate(lora.widths[:-1]), out_dim, out_dim, out_dim][:3]
    overlap = overlaps(x)
    _rows_lora_kernel[(lanes * fold["CUTS"] + programs * splits,)](
        x, codes, scales, out, workspace, scales if arrivals is None else arrivals, lora.a, lora.b, s, partial,
        lora.arrivals, lora.ready, tiles.token_slots, tiles.token_weights, tiles.counts, tiles.blocks,
        rows, in_dim, out_dim, x.stride(0), out.stride(0), part, lora.rank_stride, s.shape[-1], fold_part, most,
        lanes, *starts,
        BN=cut["BN"], BK=cut["BK"], TOKENS=tokens, SPLITS=splits, STAGES=cut["STAGES"], GATED=gated,
        RESIDUAL=residual is not None, M=per_row, PARTS=parts, **fold, PDL=overlap,
        num_warps=cut["warps"],
        **({"launch_pdl": True, "maxnreg": _registers(tokens, fold["CHUNKS"])} if overlap else {}),
    )  # fmt: skip
    return out
