"""Attention over a paged KV cache, for any mix of prefill chunks, decodes and verifications in one batch.

    out[t] = softmax(scale · q[t] K[a..p]ᵀ) V[a..p],   p = positions[t], K and V those of t's own sequence,

with a = 0, or p - window + 1 in a layer that sees only its last `window` tokens (the sliding window of Mistral, Jiang
et al. 2023; the token itself counts).

q: [T, heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim]; heads = groups * kv_heads,
and query head h reads KV head h // groups. The keys of the T tokens themselves are in the cache already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specserve_kernels.attention.backends import BACKENDS, choose
from specserve_kernels.attention.interface import AttentionBackend, AttentionMetadata, AttentionShape

__all__ = ["AttentionMetadata", "AttentionShape", "PreparedAttention", "paged_attention", "prepare"]


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """What all layers of one forward share; made by `prepare`."""

    backend: AttentionBackend
    content: Any  # the backend's own
    shape: AttentionShape
    slot_mapping: Tensor  # [T] int64


def prepare(meta: AttentionMetadata, shape: AttentionShape, backend: str | None = None) -> PreparedAttention:
    """Compute once what every layer needs. `backend`: one of BACKENDS by name; None: the fastest for this device."""
    assert len(meta.context_bounds) == meta.rows.shape[0] == meta.query_start.shape[0] - 1, meta
    assert meta.positions.shape == meta.slot_mapping.shape, meta
    if meta.query_lens is None:
        assert 1 <= meta.max_query_len <= meta.positions.shape[0], meta
    else:
        assert len(meta.query_lens) == meta.rows.shape[0] and sum(meta.query_lens) == meta.positions.shape[0], meta
    capacity = meta.block_tables.shape[1] * meta.block_size
    assert max(meta.context_bounds) <= capacity, "context bound beyond the block table"
    chosen = choose(meta, shape) if backend is None else BACKENDS[backend]
    return PreparedAttention(chosen, chosen.prepare(meta, shape), shape, meta.slot_mapping)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedAttention, scale: float, window: int | None = None
) -> Tensor:
    """Attention of q [T, heads, head_dim] over the caches → [T, heads, head_dim].

    `window`: a token at position p sees position j iff p - window < j <= p; None: all j <= p. q must be sliceable as
    [T, heads, head_dim] views (contiguous in its last two dimensions). Cache entries beyond a sequence's length may
    hold anything finite.
    """
    shape = prepared.shape
    assert q.shape[1:] == (shape.heads, shape.head_dim) and q.dtype == shape.dtype, (q.shape, q.dtype, shape)
    assert k_cache.shape[1:] == v_cache.shape[1:] == (shape.kv_heads, shape.head_dim), (k_cache.shape, shape)
    assert window is None or window >= 1, window
    return prepared.backend.attend(q, k_cache, v_cache, prepared.content, scale, window)
