"""Attention of short sequences (decodes and verifications of 1 to 16 queries) over a paged KV cache.

    out[t, h] = softmax(scale · q[t, h] K[a..p]ᵀ) V[a..p]   with p = positions[t] and a as in `attention`

Every key and value is read once: a program takes one part of one sequence's keys (an item of `attention_plan`) for one
KV head, and all queries of the sequence times the head's groups are the rows of its tile. Row r is query r // groups
of head kv_head * groups + r % groups. Scores and sums are fp32, with an online softmax in powers of two; weights are
rounded to the cache's dtype for the product with V. The last program of a sequence to finish adds up the parts
(`attention_combine`) in their order, whoever came last, so that equal inputs give equal bits. The reference is
`attention_ref.attend`.

Given a Rotation, it takes qkv as the product leaves it, and does the steps of `qkv.rotate_and_cache` too (see `raw`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.attention.combine import AHEAD, COMBINED, combine
from specserve_kernels.attention.interface import AttentionMetadata, AttentionShape, Rotation
from specserve_kernels.attention.part import attend, load_item, locate, prefetch
from specserve_kernels.attention.plan import FIELDS, Queries, capacity_of, multiprocessors, plan_triton
from specserve_kernels.attention.raw import load_other_halves, load_places, load_turn, turned, write_new
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import overlaps, wait


@relaunched
@triton.jit(do_not_specialize=["window", "table_stride", "rows", "fresh"], do_not_specialize_on_alignment=["slots"])
def _decode_kernel(
    q_ptr,  # or qkv, where there is cos
    cos,  # None: q is rotated, and the new keys and values are in the cache
    sin,
    slots,
    norm_weight,
    norm_eps,
    k_cache,
    v_cache,
    block_tables,
    positions,
    items,
    counters,
    partial,
    lse,
    out_ptr,
    window,
    scale,  # of the scores, times log2(e)
    q_stride,
    out_stride,
    slot_stride,
    table_stride,
    rows,
    fresh,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # head_dim, rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
    FIELDS: tl.constexpr,
    WINDOWED: tl.constexpr,
    NEW: tl.constexpr,  # at least the queries of a sequence, a power of two
    FINITE: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head, item, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL and fresh:  # The plan is new. The next kernels start after this wait only: they do not wait for the plan.
        tl.extra.cuda.gdc_wait()
    first_token, num_queries, table_row, begin, end, parts, first_item = load_item(items + item * FIELDS)
    if end == 0:
        if item == 0:  # a kernel ends after those before it, also if there is nothing to do
            wait(PDL)
        return
    table = block_tables + table_row.to(tl.int64) * table_stride
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tl.minimum(row // GROUPS, num_queries - 1)
    head = kv_head * GROUPS + row % GROUPS
    at = tl.load(positions + first_token + query).to(tl.int32)
    dims = tl.arange(0, DIM)
    real = row < num_queries * GROUPS
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    k_cache += kv_head * HEAD_DIM
    v_cache += kv_head * HEAD_DIM
    first_rows = locate(table, begin, end, slot_stride, BLOCK_SIZE, BLOCK_N)
    if PDL:  # q and the newest keys may not be written yet; the older keys can come nearer meanwhile
        next_rows = locate(table, begin + BLOCK_N, end, slot_stride, BLOCK_SIZE, BLOCK_N)
        prefetch(k_cache, v_cache, first_rows, HEAD_DIM)
        prefetch(k_cache, v_cache, next_rows, HEAD_DIM)
    if cos is not None:  # what else than qkv the new tokens need
        turn = load_turn(cos, sin, norm_weight, norm_eps, first_token + query, head, inside, HEAD_DIM, DIM)
        new = load_places(positions, slots, cos, sin, norm_weight, norm_eps, first_token, num_queries, begin, end,
                          KV_HEADS * GROUPS + kv_head, HEAD_DIM, NEW, DIM // 2)  # fmt: skip
    wait(PDL)
    own_rows = q_ptr + (first_token + query) * q_stride + head * HEAD_DIM
    q = tl.load(own_rows[:, None] + dims[None, :], mask=inside, other=0.0)
    if cos is not None:
        other = load_other_halves(own_rows, dims, inside, HEAD_DIM)
        write_new(q_ptr, k_cache, v_cache, new, q_stride, slot_stride, KV_HEADS * GROUPS + kv_head,
                  KV_HEADS * (GROUPS + 1) + kv_head, HEAD_DIM, DIM // 2, norm_weight is not None, FINITE)  # fmt: skip
        q = turned(q, other, turn, HEAD_DIM, norm_weight is not None, FINITE)

    acc, total, peak = attend(
        q, k_cache, v_cache, table, first_rows, at, begin, end, window, scale, slot_stride,
        HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOWED,
    )  # fmt: skip

    out_ptr += first_token * out_stride
    if parts == 1:
        target = query.to(tl.int64) * out_stride + head * HEAD_DIM
        whole = (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + target[:, None] + dims[None, :], whole, mask=inside)
    else:
        cell = (item * KV_HEADS + kv_head).to(tl.int64) * rows + row
        result = acc * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(partial + cell[:, None] * HEAD_DIM + dims[None, :], result, mask=inside)
        tl.store(lse + cell, peak + tl.log2(total), mask=real)
        counter = counters + (first_item * KV_HEADS + kv_head) * tl.num_programs(2) + row_block
        tl.debug_barrier()  # all threads' parts are written before one of them says so
        if tl.atomic_add(counter, 1) == parts - 1:
            tl.store(counter, 0)  # ready for the next layer
            first_row = row_block * BLOCK_M
            num_rows = num_queries * GROUPS
            for start in range(first_row, tl.minimum(first_row + BLOCK_M, num_rows), TILE_ROWS):
                combine(
                    partial, lse, out_ptr, parts, first_item, num_rows, kv_head, start, rows, out_stride,
                    KV_HEADS, GROUPS, HEAD_DIM, DIM, TILE_ROWS, AHEAD,
                )  # fmt: skip


class Tile(NamedTuple):
    """Keys of a tile, warps of a program, depth of its pipeline, programs a multiprocessor holds."""

    block_n: int
    warps: int
    stages: int
    resident: int


def choose_tile(dtype: torch.dtype, dim: int, rows: int) -> Tile:
    """The tile for `dim` (head_dim, a power of two) and `rows` queries times groups."""
    if dtype == torch.float32:
        return Tile(32, 4 if dim <= 128 else 8, 3, 2)
    if dim > 128:
        return Tile(32, 8, 3, 2)
    keys = 64 if dim > 64 else 128
    if rows > 32:
        return Tile(keys // 2, 4, 4, 2)
    return Tile(keys, 4, 3, 3 if rows <= 16 else 2)


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The sequences first_seq … first_seq + num_seqs - 1 of one forward, as far as they have `queries`, planned; shared
    by its layers."""

    meta: AttentionMetadata
    first_seq: int
    num_seqs: int
    queries: Queries
    rows: int  # the most queries of a sequence, times groups
    block_m: int
    tile: Tile
    counters: Tensor  # [capacity, kv_heads * row blocks] int32, all 0 between two launches
    partial: Tensor
    lse: Tensor
    plans: dict[int | None, Tensor] = field(default_factory=dict)  # items by window


def prepare_decode(
    meta: AttentionMetadata, shape: AttentionShape, first_seq: int, num_seqs: int, queries: Queries,
    tile: Tile | None = None,
) -> DecodeRun:  # fmt: skip
    """Allocate what the run's layers need. The plans are made by the first layer of each window."""
    device = meta.positions.device
    rows = queries.most * (shape.heads // shape.kv_heads)
    dim = max(16, power_of_2(shape.head_dim))
    tile = tile or choose_tile(shape.dtype, dim, rows)
    block_m = min(16 if shape.dtype == torch.float32 else 64, max(16, power_of_2(rows)))
    bounds = meta.context_bounds[first_seq : first_seq + num_seqs]
    max_tiles = sum(cdiv(bound, tile.block_n) for bound in bounds)
    planned = min(num_seqs, meta.positions.shape[0] // queries.least)
    capacity = capacity_of(planned, shape.kv_heads, max_tiles, multiprocessors(device) * tile.resident)
    counters = torch.empty(capacity, shape.kv_heads * cdiv(rows, block_m), dtype=torch.int32, device=device)
    lse = torch.empty(capacity, shape.kv_heads, rows, dtype=torch.float32, device=device)
    partial = torch.empty(*lse.shape, shape.head_dim, dtype=torch.float32, device=device)
    return DecodeRun(meta, first_seq, num_seqs, queries, rows, block_m, tile, counters, partial, lse)


def decode_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, run: DecodeRun, out: Tensor, scale: float, window: int | None,
    rotation: Rotation | None = None,
) -> None:  # fmt: skip
    """Write the attention of the run's tokens into `out` [T, heads, head_dim]; q of the same shape. With a rotation, q
    is raw qkv [T, (heads + 2 kv_heads) * head_dim], and the tokens' keys and values are written to the caches."""
    _, heads, head_dim = out.shape
    kv_heads = k_cache.shape[1]
    assert out.stride()[1:] == (head_dim, 1), out.stride()
    assert q.stride()[1:] == ((head_dim, 1) if rotation is None else (1,)), (q.stride(), rotation)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride()[1:] == (head_dim, 1), k_cache.stride()
    meta, tile = run.meta, run.tile
    fresh = window not in run.plans
    if fresh:
        run.plans[window] = plan_triton(
            meta, run.counters, first_seq=run.first_seq, num_seqs=run.num_seqs, queries=run.queries, window=window,
            tile=tile.block_n, kv_heads=kv_heads,
        )  # fmt: skip
    items = run.plans[window]
    dim = max(16, power_of_2(head_dim))
    tile_rows = min(run.block_m, power_of_2(run.rows), max(1, COMBINED // dim))
    pdl = overlaps(q)
    cos, sin, slots, norm, finite = rotation or (None, None, None, None, False)
    new = 1 if rotation is None else power_of_2(run.queries.most)
    _decode_kernel[(kv_heads, items.shape[0], cdiv(run.rows, run.block_m))](
        q, cos, sin, slots, *(norm or (None, None)),
        k_cache, v_cache, meta.block_tables, meta.positions, items, run.counters, run.partial, run.lse, out,
        window or 0, scale * math.log2(math.e), q.stride(0), out.stride(0), k_cache.stride(0),
        meta.block_tables.stride(0), run.rows, int(fresh),
        KV_HEADS=kv_heads, GROUPS=heads // kv_heads, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=meta.block_size,
        BLOCK_M=run.block_m, BLOCK_N=tile.block_n, TILE_ROWS=tile_rows, AHEAD=AHEAD, FIELDS=FIELDS,
        WINDOWED=window is not None, NEW=new, FINITE=finite, PDL=pdl,
        num_warps=tile.warps, num_stages=tile.stages, launch_pdl=pdl,
    )  # fmt: skip
