"""The Triton backend of paged attention: short sequences go to `attention_decode`, long ones to `attention_prefill`.

Consecutive sequences of one kind are one launch, so a step that decodes first and prefills after it launches two.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from specserve_kernels.attention.decode import DecodeRun, decode_attention_triton, prepare_decode
from specserve_kernels.attention.interface import SHORT_QUERY, AttentionMetadata, AttentionShape
from specserve_kernels.attention.prefill_run import PrefillRun, prefill_attention, prepare_prefill


@dataclass(frozen=True, slots=True)
class PreparedTriton:
    """What all layers of one forward share."""

    meta: AttentionMetadata
    runs: tuple[DecodeRun | PrefillRun, ...]


def takes(shape: AttentionShape, block_size: int) -> bool:
    return shape.dtype in {torch.float32, torch.bfloat16, torch.float16} and shape.head_dim <= 256


def prepare(meta: AttentionMetadata, shape: AttentionShape) -> PreparedTriton:
    flat = (meta.positions, meta.rows, meta.query_start)
    assert all(tensor.is_contiguous() for tensor in flat) and meta.block_tables.stride(1) == 1, meta
    runs: list[DecodeRun | PrefillRun] = []
    first = 0
    for short, group in groupby(length <= SHORT_QUERY for length in meta.query_lens):
        last = first + sum(1 for _ in group)
        if short:
            runs.append(prepare_decode(meta, shape, first, last - first))
        else:
            runs.append(prepare_prefill(meta, shape, first, last - first))
        first = last
    return PreparedTriton(meta, tuple(runs))


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedTriton, scale: float, window: int | None
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for run in prepared.runs:
        if isinstance(run, DecodeRun):
            decode_attention_triton(q, k_cache, v_cache, run, out, scale, window)
        else:
            prefill_attention(q, k_cache, v_cache, run, out, scale, window)
    return out
