"""attention_prefill for Hopper: warps that copy beside warps that compute (FlashAttention-3, Shah et al. 2024).

The same function as in attention_prefill, for bf16 and fp16, head_dim 64 or 128 and pages of 8 keys or a higher power
of two. A program has two groups of four warps, each with 64 rows (the query heads of 64 // groups queries), and a warp
that copies K and V for both, page by page, with the tensor memory accelerator. While the tensor cores multiply a tile's
weights with V, a group computes the softmax of the next tile, whose scores were multiplied before, and of the two
groups one computes while the other multiplies. It is written in Gluon because Triton overlaps neither.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from specserve_kernels.attention_prefill_groups import consume, produce
from specserve_kernels.language import triton

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
def _locate(query_start, first_seq, num_seqs, flat, TILE_Q: gl.constexpr):
    """Sequence of the flat tile, its first token, and the tile's first query: as in attention_prefill."""
    origin = gl.load(query_start + first_seq)
    count = 0
    for start in range(0, num_seqs, 128):
        i = start + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
        first = gl.load(query_start + first_seq + i, mask=i < num_seqs, other=0) - origin
        count += gl.sum(((first // TILE_Q + i <= flat) & (i < num_seqs)).to(gl.int32), 0)
    seq = first_seq + count - 1
    first = gl.load(query_start + seq)
    tile = flat - ((first - origin) // TILE_Q).to(gl.int32) - (count - 1)
    return seq, first.to(gl.int32), tile * TILE_Q


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit(
    do_not_specialize=["first_seq", "num_seqs", "window"],
    do_not_specialize_on_alignment=["rows", "query_start", "positions"],
)
def _prefill_kernel(
    q_ptr, k_desc, v_desc, block_tables, rows, query_start, positions, out_ptr, first_seq, num_seqs, window, scale,
    q_stride, out_stride, table_stride, GROUPS: gl.constexpr, HALVES: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    TILE_Q: gl.constexpr = 2 * (ROWS // GROUPS)
    flat = gl.num_programs(0) - 1 - gl.program_id(0)  # the last tiles see the most keys, and go first
    kv_head = gl.program_id(1)
    seq, first_token, first_query = _locate(query_start, first_seq, num_seqs, flat, TILE_Q)
    query_len = gl.load(query_start + seq + 1).to(gl.int32) - first_token
    base = gl.load(positions + first_token).to(gl.int32)
    table = block_tables + gl.load(rows + seq) * table_stride
    stop = base + gl.minimum(first_query + TILE_Q, query_len)
    last_page = (stop - 1) // BLOCK_SIZE
    start = gl.to_tensor(0)
    if WINDOWED:
        start = gl.maximum(base + gl.minimum(first_query, query_len) - window + 1, 0) // BLOCK_N * BLOCK_N
    stop = gl.where(first_query < query_len, stop, start + 1)  # a tile too many: it writes nothing

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
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
            (consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, first_token,
                       first_query, query_len, base, kv_head, start, stop, window, scale, q_stride, out_stride,
                       GROUPS, HALVES, ROWS, BLOCK_N, STAGES, WINDOWED, 0)),
            (consume, (q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, first_token,
                       first_query, query_len, base, kv_head, start, stop, window, scale, q_stride, out_stride,
                       GROUPS, HALVES, ROWS, BLOCK_N, STAGES, WINDOWED, 1)),
            (produce, (k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table, start, stop, last_page,
                       kv_head * (HALVES * 64), HALVES, BLOCK_N, PAGE, BLOCK_SIZE, STAGES)),
        ],
        [4, 1],  # warps of the second and the third; the first has the program's own four
        [240, 24] if HALVES == 2 else [232, 32],  # their registers; each thread of the first gets what is left
    )  # fmt: skip


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def takes(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_size: int) -> bool:
    """Whether this kernel can compute that attention."""
    shapes = q.shape[2] in (64, 128) and q.shape[1] // k_cache.shape[1] <= _ROWS
    pages = block_size >= 8 and block_size & (block_size - 1) == 0
    whole = k_cache.is_contiguous() and v_cache.is_contiguous()
    halves = q.dtype in (torch.bfloat16, torch.float16)
    return shapes and pages and whole and halves and q.is_cuda and _is_hopper(q.device)


def prefill_attention_hopper(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    query_start: Tensor,
    positions: Tensor,
    out: Tensor,
    *,
    first_seq: int,
    num_seqs: int,
    max_query_len: int,
    max_context: int,
    block_size: int,
    scale: float,
    window: int | None,
) -> None:
    """prefill_attention_triton where `takes` allows it."""
    assert max_context <= block_tables.shape[1] * block_size, "beyond the block table"
    _, heads, head_dim = q.shape
    slots, kv_heads, _ = k_cache.shape
    groups, page = heads // kv_heads, min(block_size, _KEYS)
    width = kv_heads * head_dim
    caches = [TensorDescriptor(c, [slots, width], [width, 1], [page, 64], _TILE) for c in (k_cache, v_cache)]
    tiles = triton.cdiv(min(q.shape[0], num_seqs * max_query_len), 2 * (_ROWS // groups)) + num_seqs - 1
    _prefill_kernel[(tiles, kv_heads)](
        q, *caches, block_tables, rows, query_start, positions, out,
        first_seq, num_seqs, window or 0, scale * math.log2(math.e), q.stride(0), out.stride(0), block_tables.stride(0),
        GROUPS=groups, HALVES=head_dim // 64, ROWS=_ROWS, BLOCK_N=_KEYS, PAGE=page, BLOCK_SIZE=block_size,
        STAGES=_STAGES, WINDOWED=window is not None, num_warps=4,
    )  # fmt: skip
