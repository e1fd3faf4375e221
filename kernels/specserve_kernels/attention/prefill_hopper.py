"""attention_prefill for Hopper: warps that copy beside warps that compute (FlashAttention-3, Shah et al. 2024).

The same function as in attention_prefill, for bf16 and fp16, head_dim 64 or 128 and pages of 8 keys or a higher power
of two, without a window. A program has two groups of four warps, each with 64 rows (the query heads of 64 // groups
queries), and a warp that copies K and V for both, page by page, with the tensor memory accelerator. While the tensor
cores multiply a tile's weights with V, a group computes the softmax of the next tile, whose scores were multiplied
before, and of the two groups one computes while the other multiplies. Programs stay: while a group finishes a tile of
queries, its next queries come, and the copying warp is ahead of both. It is written in Gluon because Triton overlaps
none of it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from specserve_kernels.attention.interface import AttentionShape
from specserve_kernels.attention.prefill_groups import consume, produce
from specserve_kernels.attention.prefill_tiles import FIELDS, TileList
from specserve_kernels.language import triton
from specserve_kernels.launch import relaunched

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = fence_async_shared = mbarrier = TensorDescriptor = triton

_ROWS = 64  # of a group of warps
_KEYS = 128  # of a tile
_STAGES = 2  # tiles of K and of V in shared memory
_TILE = gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@relaunched
@gluon.jit
def _prefill_kernel(
    q_ptr, k_desc, v_desc, block_tables, tiles, count, out_ptr, scale, q_stride, out_stride, table_stride,
    KV_HEADS: gl.constexpr, FIELDS: gl.constexpr, GROUPS: gl.constexpr, HALVES: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    items = gl.load(count).to(gl.int32) * KV_HEADS
    q_smem = gl.allocate_shared_memory(dtype, [2 * HALVES, ROWS, 64], layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * HALVES, BLOCK_N, 64], layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * HALVES, BLOCK_N, 64], layout)
    k_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, 2)
    v_full = _barriers(STAGES, 1)
    v_empty = _barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (q_ptr, out_ptr, tiles, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, items, scale,
                       q_stride, out_stride, KV_HEADS, FIELDS, GROUPS, HALVES, ROWS, BLOCK_N, STAGES, 0)),
            (consume, (q_ptr, out_ptr, tiles, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, items, scale,
                       q_stride, out_stride, KV_HEADS, FIELDS, GROUPS, HALVES, ROWS, BLOCK_N, STAGES, 1)),
            (produce, (k_desc, v_desc, tiles, block_tables, k_smem, v_smem, k_full, k_empty, v_full, v_empty, items,
                       table_stride, KV_HEADS, FIELDS, HALVES, BLOCK_N, PAGE, BLOCK_SIZE, STAGES)),
        ],
        [4, 1],  # warps of the second and the third; the first has the program's own four
        [240, 24] if HALVES == 2 else [232, 32],  # their registers; each thread of the first gets what is left
    )  # fmt: skip


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(shape: AttentionShape, block_size: int, device: torch.device) -> bool:
    """Whether this kernel can compute that attention, from caches without gaps and as far as no window hides keys."""
    groups = shape.heads // shape.kv_heads
    pages = block_size >= 8 and block_size & (block_size - 1) == 0
    sizes = shape.head_dim in (64, 128) and groups <= _ROWS and shape.dtype in (torch.bfloat16, torch.float16)
    return sizes and pages and device.type == "cuda" and _is_hopper(device)


def tile_queries(groups: int) -> int:
    """Queries of a tile, for list_tiles."""
    return 2 * (_ROWS // groups)


def prefill_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    tiles: TileList,
    out: Tensor,
    *,
    block_size: int,
    scale: float,
    programs: int | None,
) -> None:
    """prefill_attention_triton where `takes` allows it; tiles: of list_tiles, for tile_queries.

    programs: how many share the tiles, one on a multiprocessor; None: as many as there may be tiles times KV heads.
    """
    _, heads, head_dim = q.shape
    slots, kv_heads, _ = k_cache.shape
    groups, page = heads // kv_heads, min(block_size, _KEYS)
    width = kv_heads * head_dim
    assert q.stride()[1:] == out.stride()[1:] == (head_dim, 1), (q.stride(), out.stride())
    assert q.data_ptr() % 16 == out.data_ptr() % 16 == 0, "copied by 16 bytes"
    k_desc, v_desc = (TensorDescriptor(c, [slots, width], [width, 1], [page, 64], _TILE) for c in (k_cache, v_cache))
    most = tiles.records.shape[0] * kv_heads
    grid = (min(programs or most, most), 1, 1)
    numbers = scale * math.log2(math.e), q.stride(0), out.stride(0), block_tables.stride(0)
    _prefill_kernel[grid](
        q, k_desc, v_desc, block_tables, *tiles, out, *numbers, KV_HEADS=kv_heads, FIELDS=FIELDS, GROUPS=groups,
        HALVES=head_dim // 64, ROWS=_ROWS, BLOCK_N=_KEYS, PAGE=page, BLOCK_SIZE=block_size, STAGES=_STAGES, num_warps=4,
    )  # fmt: skip
