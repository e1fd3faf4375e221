"""Attention of prefill chunks over a paged KV cache, in tiles (FlashAttention-2, Dao 2023).

    out[t, h] = softmax(scale · q[t, h] Kᵀ) V   over its sequence's keys j with p − window < j ≤ p = positions[t]

q, out: [T, heads, head_dim] fp32, bf16 or fp16, contiguous in the last two dimensions; k_cache, v_cache: [num_slots,
kv_heads, head_dim], key j of a sequence in slot table[j // block_size] * block_size + j % block_size; query head h
reads KV head h // groups. Sums are fp32. Without a window all j ≤ positions[t] are visible.

A program takes one KV head and BLOCK_M rows: the `groups` query heads of BLOCK_M // groups queries, so the rows of a
tile stand close to the diagonal and few key tiles need a mask. The reference is paged_attention_ref.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.attention.prefill_tiles import SEQS, locate
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k_cache,
    v_cache,
    table,
    at,
    start,
    stop,
    end,
    slot_stride,
    window,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Fold keys start … stop − 1 (none at or beyond `end` is read) into the running sums of rows at positions `at`."""
    dims = tl.arange(0, DIM)
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        if MASKED:
            blocks = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
        else:
            blocks = tl.load(table + keys // BLOCK_SIZE)
        slots = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
        places = slots[:, None] * slot_stride + dims[None, :]
        if HEAD_DIM == DIM:
            k = tl.load(k_cache + places)
        else:
            k = tl.load(k_cache + places, mask=dims[None, :] < HEAD_DIM, other=0.0)
        scores = tl.dot(q, k.T, input_precision=precision)
        if MASKED:
            visible = keys[None, :] <= at[:, None]
            if WINDOWED:
                visible &= keys[None, :] > at[:, None] - window
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        anchor = new_peak
        if WINDOWED:  # a row may see none of the keys so far, and inf − inf is not 0
            anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * scale - anchor[:, None])
        decay = tl.exp2(peak - anchor)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        if HEAD_DIM == DIM:
            v = tl.load(v_cache + places)
        else:
            v = tl.load(v_cache + places, mask=dims[None, :] < HEAD_DIM, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=precision)
        peak = new_peak
    return acc, total, peak


@relaunched
@triton.jit(
    do_not_specialize=["first_seq", "num_seqs", "shortest", "window"],
    do_not_specialize_on_alignment=["rows", "query_start", "positions"],
)
def _prefill_kernel(
    q_ptr,
    k_cache,
    v_cache,
    block_tables,
    rows,
    query_start,
    positions,
    out_ptr,
    first_seq,
    num_seqs,
    shortest,
    window,
    scale,  # of the scores, times log2(e)
    q_stride,
    out_stride,
    slot_stride,
    head_stride,
    table_stride,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # head_dim, rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SEQS: tl.constexpr,
):
    TILE_Q: tl.constexpr = BLOCK_M // GROUPS
    # The last tiles see the most keys: they go first, so that the end of the grid is made of short ones.
    flat = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq, first_token, tile = locate(query_start, first_seq, num_seqs, flat, TILE_Q, SEQS)
    query_len = (tl.load(query_start + seq + 1) - first_token).to(tl.int32)
    if (tile * TILE_Q >= query_len) | (query_len < shortest):
        return
    row = tl.arange(0, BLOCK_M)
    query = tile * TILE_Q + row // GROUPS
    real = (row // GROUPS < TILE_Q) & (query < query_len)
    query = tl.minimum(query, query_len - 1)
    base = tl.load(positions + first_token).to(tl.int32)
    at = base + query
    first_at = base + tile * TILE_Q
    end = tl.minimum(first_at + TILE_Q, base + query_len)
    table = block_tables + tl.load(rows + seq) * table_stride
    dims = tl.arange(0, DIM)
    heads = (kv_head * GROUPS + row % GROUPS) * HEAD_DIM
    token = (first_token + query).to(tl.int64)
    inside = real[:, None] & (dims[None, :] < HEAD_DIM)
    q = tl.load(q_ptr + (token * q_stride + heads)[:, None] + dims[None, :], mask=inside, other=0.0)
    k_cache += kv_head * head_stride
    v_cache += kv_head * head_stride

    acc = tl.zeros([BLOCK_M, DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    start = 0
    if WINDOWED:
        start = tl.maximum(first_at - window + 1, 0) // BLOCK_N * BLOCK_N
    middle = start  # keys from here on, up to the diagonal's first tile, are visible to every row
    diagonal = tl.maximum((first_at + 1) // BLOCK_N * BLOCK_N, start)
    if WINDOWED:
        middle = (tl.maximum(end - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        middle = tl.minimum(tl.maximum(middle, start), diagonal)
        acc, total, peak = _attend(
            acc, total, peak, q, k_cache, v_cache, table, at, start, middle, end, slot_stride, window, scale,
            HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, MASKED=True, WINDOWED=True,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_cache, v_cache, table, at, middle, diagonal, end, slot_stride, window, scale,
        HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, MASKED=False, WINDOWED=WINDOWED,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_cache, v_cache, table, at, diagonal, end, end, slot_stride, window, scale,
        HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N, MASKED=True, WINDOWED=WINDOWED,
    )  # fmt: skip
    acc = acc / total[:, None]
    places = (token * out_stride + heads)[:, None] + dims[None, :]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, depth of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_tile(dtype: torch.dtype, dim: int, groups: int) -> Tile:
    """The tile for `dim` (head_dim, a power of two)."""
    least = max(16, power_of_2(groups))
    if dtype == torch.float32:  # no tensor cores in full fp32: small tiles keep the products in registers
        return Tile(max(32, least) if dim <= 128 else max(16, least), 32, 8, 1)
    if dim > 128:
        return Tile(max(64, least), 64, 8, 2)
    return Tile(max(64, least), 64, 4, 3)  # two programs on a multiprocessor


def prefill_attention_triton(
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
    shortest: int = 1,
    tile: Tile | None = None,
) -> None:
    """Write the attention of sequences first_seq … first_seq + num_seqs − 1 into their tokens of `out`, on any GPU.
    Those of fewer than `shortest` queries are left out.

    block_tables [R, max_blocks], rows [B], query_start [B + 1], positions [T] int64: sequence b reads its blocks from
    block_tables[rows[b]] and owns the tokens query_start[b] … query_start[b + 1] − 1, at consecutive positions.
    max_query_len, max_context: upper bounds known to the host. Nothing here waits for the device.
    """
    _, heads, head_dim = q.shape
    kv_heads = k_cache.shape[1]
    queries = min(q.shape[0], num_seqs * max_query_len)
    groups = heads // kv_heads
    assert q.stride()[1:] == out.stride()[1:] == (head_dim, 1), (q.stride(), out.stride())
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(2) == 1, (k_cache.stride(), v_cache.stride())
    assert max_context <= block_tables.shape[1] * block_size and block_tables.stride(1) == 1, "beyond the block table"
    dim = max(16, power_of_2(head_dim))
    tile = tile or choose_tile(q.dtype, dim, groups)
    tile_q = tile.block_m // groups
    tiles = cdiv(queries, tile_q) + num_seqs - 1
    _prefill_kernel[(tiles, kv_heads)](
        q, k_cache, v_cache, block_tables, rows, query_start, positions, out,
        first_seq, num_seqs, shortest, window or 0, scale * math.log2(math.e),
        q.stride(0), out.stride(0), k_cache.stride(0), k_cache.stride(1), block_tables.stride(0),
        GROUPS=groups, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=block_size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, WINDOWED=window is not None, SEQS=SEQS,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
