"""The Triton backend of paged attention: short sequences go to `attention_decode`, long ones to `attention_prefill`.

Consecutive sequences of one kind are one launch, so a step that decodes first and prefills after it launches two. Where
only the device knows the lengths, each kind of sequence that may be there is a launch over all of them, in which those
of other kinds are passed by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from specserve_kernels.attention.decode import DecodeRun, decode_attention_triton, prepare_decode
from specserve_kernels.attention.interface import SHORT_QUERY, AttentionMetadata, AttentionShape, Rotation
from specserve_kernels.attention.plan import Queries
from specserve_kernels.attention.prefill_run import PrefillRun, prefill_attention, prepare_prefill


@dataclass(frozen=True, slots=True)
class PreparedTriton:
    """What all layers of one forward share."""

    meta: AttentionMetadata
    runs: tuple[DecodeRun | PrefillRun, ...]
    out: Tensor | None  # ragged: what every layer writes to, 0 where no sequence has tokens


def takes(shape: AttentionShape, block_size: int) -> bool:
    return shape.dtype in {torch.float32, torch.bfloat16, torch.float16} and shape.head_dim <= 256


def prepare(meta: AttentionMetadata, shape: AttentionShape) -> PreparedTriton:
    flat = (meta.positions, meta.rows, meta.query_start)
    assert all(tensor.is_contiguous() for tensor in flat) and meta.block_tables.stride(1) == 1, meta
    if meta.query_lens is None:
        out = meta.positions.new_zeros(meta.positions.shape[0], shape.heads, shape.head_dim, dtype=shape.dtype)
        return PreparedTriton(meta, tuple(_ragged_runs(meta, shape)), out)
    return PreparedTriton(meta, tuple(_known_runs(meta, meta.query_lens, shape)), None)


def _known_runs(
    meta: AttentionMetadata, query_lens: tuple[int, ...], shape: AttentionShape
) -> Iterator[DecodeRun | PrefillRun]:
    first = 0
    for short, group in groupby(length <= SHORT_QUERY for length in query_lens):
        last = first + sum(1 for _ in group)
        if short:  # one or SHORT_QUERY: each number between would be a kernel to compile while somebody waits
            most = 1 if max(query_lens[first:last]) == 1 else SHORT_QUERY
            yield prepare_decode(meta, shape, first, last - first, Queries(1, most))
        else:
            yield prepare_prefill(meta, shape, first, last - first)
        first = last


def _ragged_runs(meta: AttentionMetadata, shape: AttentionShape) -> Iterator[DecodeRun | PrefillRun]:
    """Decodes are many and have tiles of their own, unless all are so short that they fit into one kind of tile."""
    count, most = meta.rows.shape[0], meta.max_query_len
    if most <= SHORT_QUERY:
        yield prepare_decode(meta, shape, 0, count, Queries(1, most))
        return
    yield prepare_decode(meta, shape, 0, count, Queries(1, 1))
    yield prepare_decode(meta, shape, 0, count, Queries(2, SHORT_QUERY))
    yield prepare_prefill(meta, shape, 0, count, shortest=SHORT_QUERY + 1)


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedTriton, scale: float, window: int | None
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if prepared.out is None else prepared.out
    for run in prepared.runs:
        if isinstance(run, DecodeRun):
            decode_attention_triton(q, k_cache, v_cache, run, out, scale, window)
        else:
            prefill_attention(q, k_cache, v_cache, run, out, scale, window)
    return out


def takes_qkv(prepared: PreparedTriton) -> bool:
    return len(prepared.runs) == 1 and isinstance(prepared.runs[0], DecodeRun)


def attend_qkv(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedTriton, rotation: Rotation, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    (run,) = prepared.runs
    assert isinstance(run, DecodeRun), run
    out, (_, kv_heads, head_dim) = prepared.out, k_cache.shape
    if out is None:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)
    decode_attention_triton(qkv, k_cache, v_cache, run, out, scale, window, rotation)
    return out
