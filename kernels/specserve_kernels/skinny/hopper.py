"""Products of up to 128 rows for Hopper: y = x Wᵀ at the speed at which W is read. Variants and shapes as in skinny.

A program takes ROWS rows of W (gated: as many of Wg and of Wu) and one of SPLITS parts of `in`. One warp copies tiles
of W and x into a ring of STAGES stages in shared memory with the tensor memory accelerator, four warps multiply them:
W is the left operand, whose rows fill the instruction, xᵀ the narrow one. The copying warp fills the ring with W before
it waits for the kernels before, on which only x depends (see overlap): so W is read through the end of one kernel and
the start of the next. That asks for two programs on a multiprocessor, so the ring takes less than half of its memory.

With parts, each stores its fp32 sums in a workspace [SPLITS, rows, out]; the one to arrive last adds them in the order
of the parts, so that the result does not depend on who was last, and sets its counter of arrivals back to 0. Written in
Gluon because Triton cannot load W before the wait and x after it.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.folded import MOST_FOLDED, Folded
from specserve_kernels.lora.grouped import SlotFactors
from specserve_kernels.lora.tiles import RANK_BLOCK
from specserve_kernels.overlap import overlaps
from specserve_kernels.skinny.ahead import Ahead, padded_rows
from specserve_kernels.skinny.hopper_fold import consume_fold, produce_fold
from specserve_kernels.skinny.hopper_parts import consume, produce

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = fence_async_shared = mbarrier = TensorDescriptor = triton

_TILE = gl.NVMMASharedLayout(128, 16, rank=2)
_WIDTH = 64  # columns of a tile: 128 bytes, the widest swizzle
_HALF = 111 * 1024  # of a multiprocessor's memory: two programs on it
_WHOLE = 200 * 1024
_PROGRAMS = 132  # multiprocessors
MOST_ROWS = MOST_FOLDED
_FOLDS = 48  # programs that multiply by A, where adapters are few


@relaunched
@gluon.jit(do_not_specialize=["count", "steps", "normed_tiles"])
def _skinny_kernel(
    w_desc, x_desc, out, workspace, arrivals, count, out_dim, steps, out_stride,
    gain, scaled, squares, eps, normed_tiles, normed_size,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr, LEAVES: gl.constexpr, NORMED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program p: part p % SPLITS of tile p // SPLITS. steps: stages along `in` of a part; DEPTH tiles in a stage."""
    w_smem, x_smem, full, empty = _ring(out.dtype.element_ty, ROWS, TOKENS, DEPTH, STAGES, GATED)
    norm = (gain, scaled, squares, eps, normed_tiles, normed_size)
    gl.warp_specialize(
        [
            (_consume, (out, workspace, arrivals, norm, w_smem, x_smem, full, empty, count, out_dim, steps, out_stride,
                        ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LEAVES, NORMED, PDL)),
            (_produce, (w_desc, x_desc, w_smem, x_smem, full, empty, out_dim, steps,
                        ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, PDL)),
        ],
        [1],
        [40],
    )  # fmt: skip


@gluon.jit
def _ring(dtype: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
          GATED: gl.constexpr):  # fmt: skip
    """Shared memory for tiles of W and x, and the barriers of its stages."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    MATRICES: gl.constexpr = 2 if GATED else 1
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * DEPTH * MATRICES, ROWS, 64], layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * DEPTH, TOKENS, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return w_smem, x_smem, full, empty


@gluon.jit
def _consume(out, workspace, arrivals, norm, w_smem, x_smem, full, empty, count, out_dim, steps, out_stride,
             ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
             SPLITS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, LEAVES: gl.constexpr,
             NORMED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    consume(out, workspace, arrivals, None, norm, w_smem, x_smem, full, empty, gl.program_id(0), count, out_dim, steps,
            out_stride, ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LEAVES, NORMED, 0, PDL)  # fmt: skip


@gluon.jit
def _produce(w_desc, x_desc, w_smem, x_smem, full, empty, out_dim, steps,
             ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
             SPLITS: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    produce(w_desc, x_desc, None, w_smem, x_smem, full, empty, gl.program_id(0), out_dim, steps,
            ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, 0, PDL)  # fmt: skip


@relaunched
@gluon.jit(do_not_specialize=["count", "steps", "normed_tiles", "folds", "fold_parts", "fold_steps"])
def _skinny_lora_kernel(
    w_desc, x_desc, out, workspace, arrivals, count, out_dim, steps, out_stride,
    gain, scaled, squares, eps, normed_tiles, normed_size,
    a_desc, b_desc, s_desc, s, s_stride, sums, fold_arrivals, ready, counts, blocks, token_slots, token_weights,
    rank_stride, second, third, fourth, folds, fold_parts, fold_steps,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr, LEAVES: gl.constexpr, NORMED: gl.constexpr,
    PARTS: gl.constexpr, M: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The first `folds` programs compute s (hopper_fold), the others are those of _skinny_kernel, and add s B."""
    w_smem, x_smem, full, empty = _ring(out.dtype.element_ty, ROWS, TOKENS, DEPTH, STAGES, GATED)
    adapters = (b_desc, s_desc, ready, counts, blocks, rank_stride, second, third, fourth)
    fold = (a_desc, s, s_stride, sums, fold_arrivals, ready, counts, blocks, token_slots, token_weights, rank_stride,
            folds, fold_parts, fold_steps)  # fmt: skip
    norm = (gain, scaled, squares, eps, normed_tiles, normed_size)
    gl.warp_specialize(
        [
            (_consume_lora, (out, workspace, arrivals, norm, fold, w_smem, x_smem, full, empty, count, out_dim, steps,
                             out_stride, ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LEAVES, NORMED, PARTS, M,
                             PDL)),
            (_produce_lora, (w_desc, x_desc, adapters, fold, w_smem, x_smem, full, empty, out_dim, steps,
                             ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, PARTS, PDL)),
        ],
        [1],
        [56],
    )  # fmt: skip


@gluon.jit
def _consume_lora(out, workspace, arrivals, norm, fold, w_smem, x_smem, full, empty, count, out_dim, steps, out_stride,
                  ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
                  SPLITS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, LEAVES: gl.constexpr,
                  NORMED: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    _, _, _, _, _, _, counts, _, _, _, _, folds, _, _ = fold
    program = gl.program_id(0) - folds
    if program < 0:
        consume_fold(fold, w_smem, x_smem, full, empty, TOKENS, DEPTH, STAGES, 2 if GATED else 1, PARTS, M, PDL)
    else:
        consume(out, workspace, arrivals, counts, norm, w_smem, x_smem, full, empty, program, count, out_dim, steps,
                out_stride, ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LEAVES, NORMED, PARTS,
                PDL)  # fmt: skip


@gluon.jit
def _produce_lora(w_desc, x_desc, adapters, fold, w_smem, x_smem, full, empty, out_dim, steps,
                  ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
                  SPLITS: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    _, _, _, _, _, _, _, _, _, _, _, folds, _, _ = fold
    program = gl.program_id(0) - folds
    if program < 0:
        produce_fold(x_desc, fold, w_smem, x_smem, full, empty, TOKENS, DEPTH, STAGES, 2 if GATED else 1, PARTS, PDL)
    else:
        produce(w_desc, x_desc, adapters, w_smem, x_smem, full, empty, program, out_dim, steps,
                ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, PARTS, PDL)  # fmt: skip


def _registers(sums: int, splits: int, *, alone: bool) -> int:
    """Of each of the 256 threads: few, for several programs and the next kernel's to share a multiprocessor, unless the
    program's ring fills its memory anyway."""
    if sums < 4096 or (sums == 4096 and splits < 4 and not alone):
        return 80
    return 200 if alone else 128


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def suits(x: Tensor) -> bool:
    """Whether this kernel is for such x: on Hopper, of 16 bits."""
    return x.is_cuda and x.shape[0] <= MOST_ROWS and x.dtype in (torch.bfloat16, torch.float16) and _is_hopper(x.device)


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel can multiply these: `suits`, and laid out as the copies need it."""
    aligned = weight.shape[1] % 8 == x.stride(0) % 8 == 0 and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    return suits(x) and weight.dtype == x.dtype and aligned


def takes_lora(x: Tensor, weight: Tensor, factors: SlotFactors) -> bool:
    """Whether this kernel can add these adapters' share to such a product: `takes`, each of its tiles in one part. Not
    in float16, where s might overflow."""
    fits = x.dtype == factors.b.dtype == torch.bfloat16 and factors.b.shape[1] == weight.shape[0]
    parts = all(width % _WIDTH == 0 for width in factors.widths) and factors.b.data_ptr() % 16 == 0
    return takes(x, weight) and fits and parts and factors.b.is_contiguous()


def choose_cut(
    rows: int, out_dim: int, in_dim: int, gated: bool, *, adapters: bool = False, many: bool = False
) -> dict[str, int]:
    """Rows of W in a tile (of each matrix), tiles and stages of the ring, parts along `in`. A W of few tiles is parted
    until every multiprocessor has a program, whose ring fills its memory unless `many` blocks of adapters' ranks are
    read beside; else two programs share a multiprocessor. From 64 rows on parts cost more, the more to be added up."""
    tokens, matrices, tiles = padded_rows(rows), 2 if gated else 1, cdiv(out_dim, 64)
    least = 8192 if tokens >= 64 and adapters else 2048
    splits = 1
    while not gated and splits < 4 and tiles * splits * 2 <= _PROGRAMS and in_dim >= least * splits:
        splits *= 2
    depth = 1 if tokens > 64 else 2
    memory = (_WHOLE if _fills(out_dim, gated, many=many) else _HALF) - min(64 * tokens * 4, 9 * 1024)
    stages = memory // (2 * (64 * matrices + tokens) * 64 * depth)
    return {"ROWS": 64, "DEPTH": depth, "STAGES": max(2, stages), "SPLITS": splits}


def _fills(out_dim: int, gated: bool, *, many: bool) -> bool:
    """Whether one program's ring takes a multiprocessor's memory."""
    return not gated and not many and cdiv(out_dim, 64) <= _PROGRAMS


def skinny_linear_hopper(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    cut: dict[str, int] | None = None,
    lora: Folded | None = None,
    leaves: tuple[Tensor, Ahead] | None = None,
    normed: tuple[Ahead, Tensor] | None = None,
) -> Tensor:
    """x Wᵀ where `takes` allows it, plus what adapters add where `takes_lora` does. arrivals: int32 zeros, one a tile
    of W or more, of which kernels on one stream may share one tensor; without it `in` is not parted.

    See skinny.ahead: leaves: (g [out], what is filled, of the residual). normed: (what was left, whose `scaled` x is;
    eps []).
    """
    assert leaves is None or residual is not None, "what is left is of a residual"
    assert normed is None or normed[0].scaled is x, "x is what was left"
    rows, in_dim = x.shape
    out_dim = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, out_dim) if residual is None else residual
    tokens = padded_rows(rows)
    many = lora is not None and lora.many
    cut = cut or choose_cut(rows, out_dim, in_dim, gated, adapters=lora is not None, many=many)
    splits = 1 if arrivals is None else cut["SPLITS"]
    tiles = cdiv(out_dim, cut["ROWS"])
    assert arrivals is None or arrivals.numel() >= tiles, (arrivals.shape, tiles)
    workspace = out if splits == 1 else x.new_empty(splits, rows, out_dim, dtype=torch.float32)
    w_desc = TensorDescriptor(weight, list(weight.shape), [in_dim, 1], [cut["ROWS"], _WIDTH], _TILE)
    x_desc = TensorDescriptor(x, [rows, in_dim], [x.stride(0), 1], [tokens, _WIDTH], _TILE)
    overlap, sums = overlaps(x), cut["ROWS"] * tokens * (2 if gated else 1)
    arguments = (
        w_desc, x_desc, out, workspace, out if arrivals is None else arrivals, rows, out_dim,
        cdiv(in_dim, _WIDTH * cut["DEPTH"] * splits), out.stride(0), *_norm_arguments(out, leaves, normed),
    )  # fmt: skip
    constants = {
        **cut, "TOKENS": tokens, "SPLITS": splits, "GATED": gated, "RESIDUAL": residual is not None,
        "LEAVES": leaves is not None, "NORMED": normed is not None, "PDL": overlap,
        "num_warps": 4, "maxnreg": _registers(sums, splits, alone=_fills(out_dim, gated, many=many)),
    }  # fmt: skip
    if overlap:
        constants["launch_pdl"] = True  # others than NVIDIA's do not know it
    if lora is None:
        _skinny_kernel[(tiles * splits,)](*arguments, **constants)
        return out
    assert not gated or lora.widths in ((out_dim, out_dim), (2 * out_dim,)), lora.widths
    most, per_row = lora.tiles.blocks.shape[1], lora.tiles.token_slots.shape[1]
    parts = len(lora.widths)
    folds, fold_parts = _choose_fold(cdiv(most, 4), parts, in_dim, tokens, tiles * splits, many=many)
    constants |= {"PARTS": parts, "M": per_row}
    _skinny_lora_kernel[(folds + tiles * splits,)](
        *arguments, *_fold_arguments(x, lora, tokens, fold_parts), folds, fold_parts,
        cdiv(in_dim, _WIDTH * cut["DEPTH"] * fold_parts), **constants,
    )  # fmt: skip
    return out


def _norm_arguments(
    unused: Tensor, leaves: tuple[Tensor, Ahead] | None, normed: tuple[Ahead, Tensor] | None
) -> tuple[Tensor | int, ...]:
    """What the kernels take of the norms around a product: g, scaled, squares, eps, tiles and columns of what is
    normed."""
    gain, ahead = leaves or (unused, Ahead(unused, unused))
    if normed is None:
        return gain, *ahead, unused, 0, 0
    return gain, *normed[0], normed[1], normed[0].squares.shape[0], normed[0].scaled.shape[1]


def _choose_fold(
    units: int, parts: int, in_dim: int, tokens: int, programs: int, *, many: bool
) -> tuple[int, int]:  # fmt: skip
    """(how many programs compute s, into how many parts along `in` they cut each of `units` of each of `parts`): enough
    to be done before the `programs` for W come to it, and no more, for they come before those, whose copies of W should
    begin early. How many units a batch uses only the device knows."""
    if many:  # they fill the programs anyway, and adding up parts takes time
        cuts = max(1, min(8, in_dim // 1024))
        return min(units * parts * cuts, _PROGRAMS), cuts
    if tokens < 64:
        cuts = max(1, min(16, in_dim // 512))
        return min(units * parts * cuts, _FOLDS), cuts
    cuts = max(1, min(8, in_dim // 512, 16 // parts))
    return min(units * parts * cuts, max(28, min(_FOLDS, _PROGRAMS - programs))), cuts


def _fold_arguments(x: Tensor, lora: Folded, tokens: int, fold_parts: int) -> tuple[Any, ...]:
    """What the kernel takes of adapters: A, B and s in boxes, where sums lie on the way, what the tokens use, where the
    parts begin."""
    tiles, parts = lora.tiles, len(lora.widths)
    units = cdiv(tiles.blocks.shape[1], 4)
    ranks, out_dim = lora.b.shape
    s = x.new_empty(parts * tokens, units * _WIDTH)
    sums = tiles.token_weights.new_empty(units * parts * fold_parts * _WIDTH * tokens)
    a_desc = TensorDescriptor(lora.a, list(lora.a.shape), [lora.a.shape[1], 1], [RANK_BLOCK, _WIDTH], _TILE)
    b_desc = TensorDescriptor(lora.b, [ranks, out_dim], [out_dim, 1], [RANK_BLOCK, _WIDTH], _TILE)
    s_desc = TensorDescriptor(s, list(s.shape), [s.shape[1], 1], [tokens, _WIDTH], _TILE)
    starts = [*accumulate(lora.widths[:-1]), out_dim, out_dim, out_dim][:3]
    return (
        a_desc, b_desc, s_desc, s, s.stride(0), sums, lora.arrivals, lora.ready, tiles.counts, tiles.blocks,
        tiles.token_slots, tiles.token_weights, lora.rank_stride, *starts,
    )  # fmt: skip
