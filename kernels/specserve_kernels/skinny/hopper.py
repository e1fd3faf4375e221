"""Products of up to 64 rows for Hopper: y = x Wᵀ at the speed at which W is read. Variants and shapes as in skinny.

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
from specserve_kernels.lora.fold import Folded
from specserve_kernels.lora.grouped import SlotFactors
from specserve_kernels.lora.tiles import RANK_BLOCK
from specserve_kernels.overlap import overlaps
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


@relaunched
@gluon.jit(do_not_specialize=["count", "steps"])
def _skinny_kernel(
    w_desc, x_desc, out, workspace, arrivals, count, out_dim, steps, out_stride,
    b_desc, s_desc, counts, blocks, rank_stride, tile, second, third, fourth,
    ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, RESIDUAL: gl.constexpr, LORA: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program p: part p % SPLITS of tile p // SPLITS. steps: stages along `in` of a part; DEPTH tiles in a stage.

    With LORA, stages of s and B follow those of x and W (hopper_lora): b_desc … fourth from `_arguments`.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = out.dtype.element_ty
    MATRICES: gl.constexpr = 2 if GATED else 1
    w_smem = gl.allocate_shared_memory(dtype, [STAGES * DEPTH * MATRICES, ROWS, 64], layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES * DEPTH, TOKENS, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    if LORA:
        adapters = (b_desc, s_desc, counts, blocks, rank_stride, tile, second, third, fourth)
        gl.warp_specialize(
            [
                (consume, (out, workspace, arrivals, counts, w_smem, x_smem, full, empty, count, out_dim, steps,
                           out_stride, ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LORA, PDL)),
                (produce, (w_desc, x_desc, adapters, w_smem, x_smem, full, empty, out_dim, steps,
                           ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, LORA, PDL)),
            ],
            [1],
            [56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (out, workspace, arrivals, None, w_smem, x_smem, full, empty, count, out_dim, steps,
                           out_stride, ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, RESIDUAL, LORA, PDL)),
                (produce, (w_desc, x_desc, None, w_smem, x_smem, full, empty, out_dim, steps,
                           ROWS, TOKENS, DEPTH, STAGES, SPLITS, GATED, LORA, PDL)),
            ],
            [1],
            [40],
        )  # fmt: skip


def _tokens(rows: int) -> int:
    return max(8, 1 << (rows - 1).bit_length())


def _registers(sums: int, splits: int) -> int:
    """Of each of the 256 threads: few, for several programs and the next kernel's to share a multiprocessor."""
    return 80 if sums < 4096 or (sums == 4096 and splits < 4) else 128


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def suits(x: Tensor) -> bool:
    """Whether this kernel is for such x: on Hopper, of 16 bits."""
    return x.is_cuda and x.shape[0] <= 64 and x.dtype in (torch.bfloat16, torch.float16) and _is_hopper(x.device)


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


def choose_cut(rows: int, out_dim: int, in_dim: int, gated: bool) -> dict[str, int]:
    """Rows of W in a tile (of each matrix), tiles and stages of the ring, parts along `in`. A W of few tiles is parted
    until every multiprocessor has a program, whose ring fills its memory; of more tiles, two programs share one."""
    tokens, matrices, tiles = _tokens(rows), 2 if gated else 1, cdiv(out_dim, 64)
    is_small = not gated and tiles <= _PROGRAMS
    splits = 1
    while is_small and splits < 4 and tiles * splits * 2 <= _PROGRAMS and in_dim >= 2048 * splits:
        splits *= 2
    memory = (_WHOLE if is_small else _HALF) - 64 * tokens * 4
    stages = memory // (2 * (64 * matrices + tokens) * 128)
    return {"ROWS": 64, "DEPTH": 2, "STAGES": max(2, stages), "SPLITS": splits}


def _arguments(lora: Folded | None, tokens: int) -> tuple[Any, ...]:
    """What the kernel takes of adapters: B in boxes of a rank block, s, the blocks in use, where the parts begin."""
    if lora is None:
        return (None,) * 9
    ranks, out_dim = lora.b.shape
    b_desc = TensorDescriptor(lora.b, [ranks, out_dim], [out_dim, 1], [RANK_BLOCK, _WIDTH], _TILE)
    s_desc = TensorDescriptor(lora.s, list(lora.s.shape), list(lora.s.stride()), [tokens, _WIDTH], _TILE)
    starts = [*accumulate(lora.widths[:-1]), out_dim, out_dim, out_dim][:3]
    return (b_desc, s_desc, lora.tiles.counts, lora.tiles.blocks, lora.rank_stride, lora.tiles.tile, *starts)


def skinny_linear_hopper(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    cut: dict[str, int] | None = None,
    lora: Folded | None = None,
) -> Tensor:
    """x Wᵀ where `takes` allows it, plus what adapters add where `takes_lora` does. arrivals: int32 zeros, one a tile
    of W or more, of which kernels on one stream may share one tensor; without it `in` is not parted."""
    rows, in_dim = x.shape
    out_dim = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, out_dim) if residual is None else residual
    tokens = _tokens(rows)
    assert lora is None or not gated or lora.widths in ((out_dim, out_dim), (2 * out_dim,)), lora.widths
    cut = choose_cut(rows, out_dim, in_dim, gated) if cut is None else cut
    splits = 1 if arrivals is None else cut["SPLITS"]
    tiles = cdiv(out_dim, cut["ROWS"])
    assert arrivals is None or arrivals.numel() >= tiles, (arrivals.shape, tiles)
    workspace = out if splits == 1 else x.new_empty(splits, rows, out_dim, dtype=torch.float32)
    w_desc = TensorDescriptor(weight, list(weight.shape), [in_dim, 1], [cut["ROWS"], _WIDTH], _TILE)
    x_desc = TensorDescriptor(x, [rows, in_dim], [x.stride(0), 1], [tokens, _WIDTH], _TILE)
    steps = cdiv(in_dim, _WIDTH * cut["DEPTH"] * splits)
    overlap = overlaps(x)
    options = {"launch_pdl": True} if overlap else {}  # others than NVIDIA's do not know it
    _skinny_kernel[(tiles * splits,)](
        w_desc, x_desc, out, workspace, out if arrivals is None else arrivals, rows, out_dim, steps, out.stride(0),
        *_arguments(lora, tokens), ROWS=cut["ROWS"], TOKENS=tokens, DEPTH=cut["DEPTH"], STAGES=cut["STAGES"],
        SPLITS=splits, GATED=gated, RESIDUAL=residual is not None, LORA=lora is not None, PDL=overlap,
        num_warps=4, maxnreg=_registers(cut["ROWS"] * tokens * (2 if gated else 1), splits), **options,
    )  # fmt: skip
    return out
