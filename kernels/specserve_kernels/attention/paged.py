"""Attention over a paged KV cache, for any mix of prefill chunks, decodes and verifications in one batch.

    out[t] = softmax(scale · q[t] K[a..p]ᵀ) V[a..p],   p = positions[t], K and V those of t's own sequence,

with a = 0, or p - window + 1 in a layer that sees only its last `window` tokens (the sliding window of Mistral, Jiang
et al. 2023; the token itself counts).

q: [T, heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim]; heads = groups * kv_heads,
and query head h reads KV head h // groups. The keys of the T tokens themselves are in the cache already; or they come
with the queries, as the product leaves them, and rotation and the cache's writes are a part of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specserve_kernels.attention.backends import BACKENDS, choose
from specserve_kernels.attention.interface import AttentionBackend, AttentionMetadata, AttentionShape, Rotation
from specserve_kernels.qkv import HeadWeights

__all__ = ["AttentionMetadata", "AttentionShape", "PreparedAttention", "paged_attention", "prepare", "qkv_attention"]

MOST_FUSED = 16
"""Tokens up to which forwards whose sequences are all short rotate and write within attention. On an H200 that takes
0.4 to 2 µs a layer off with 40 tokens and fewer; 32 decodes of 128 numbers a head get 2.8 µs slower."""


@dataclass(frozen=True, slots=True)
class PreparedAttention:
    """What all layers of one forward share; made by `prepare`."""

    backend: AttentionBackend
    content: Any  # the backend's own
    shape: AttentionShape
    slot_mapping: Tensor  # [T] int64
    takes_qkv: bool  # whether `qkv_attention` may be called, in place of rotate_and_cache and `paged_attention`


def prepare(
    meta: AttentionMetadata, shape: AttentionShape, backend: str | None = None, *, fused: bool | None = None
) -> PreparedAttention:
    """Compute once what every layer needs. `backend`: one of BACKENDS by name; None: the fastest for this device.
    `fused`: for measurements, in place of what MOST_FUSED says."""
    assert len(meta.context_bounds) == meta.rows.shape[0] == meta.query_start.shape[0] - 1, meta
    assert meta.positions.shape == meta.slot_mapping.shape, meta
    if meta.query_lens is None:
        assert 1 <= meta.max_query_len <= meta.positions.shape[0], meta
    else:
        assert len(meta.query_lens) == meta.rows.shape[0] and sum(meta.query_lens) == meta.positions.shape[0], meta
    capacity = meta.block_tables.shape[1] * meta.block_size
    assert max(meta.context_bounds) <= capacity, "context bound beyond the block table"
    chosen = choose(meta, shape) if backend is None else BACKENDS[backend]
    content = chosen.prepare(meta, shape)
    fused = meta.positions.shape[0] <= MOST_FUSED if fused is None else fused
    takes_qkv = fused and chosen.takes_qkv(content)
    return PreparedAttention(chosen, content, shape, meta.slot_mapping, takes_qkv)


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


def qkv_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: PreparedAttention, scale: float,
    window: int | None = None, *, norm: HeadWeights | None, finite: bool,
) -> Tensor:  # fmt: skip
    """`qkv.rotate_and_cache`, then `paged_attention`, in one kernel → [T, heads, head_dim]; where
    `prepared.takes_qkv`. qkv is used up; tokens that belong to no sequence write nothing."""
    shape = prepared.shape
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    assert prepared.takes_qkv and qkv.is_contiguous() and qkv.shape == (*prepared.slot_mapping.shape, width), qkv.shape
    assert cos.shape == sin.shape == (qkv.shape[0], 1, shape.head_dim), (cos.shape, sin.shape)
    assert cos.is_contiguous() and sin.is_contiguous(), (cos.stride(), sin.stride())
    assert qkv.dtype == cos.dtype == sin.dtype == shape.dtype, (qkv.dtype, cos.dtype, shape)
    assert k_cache.shape[1:] == v_cache.shape[1:] == (shape.kv_heads, shape.head_dim), (k_cache.shape, shape)
    assert window is None or window >= 1, window
    rotation = Rotation(cos, sin, prepared.slot_mapping, norm, finite)
    return prepared.backend.attend_qkv(qkv, k_cache, v_cache, prepared.content, rotation, scale, window)
