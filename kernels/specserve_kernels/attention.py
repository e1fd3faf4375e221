"""Attention over a paged KV cache, for any mix of prefill chunks, decodes and verifications in one batch.

    out[t] = softmax(scale · q[t] K[0..p]ᵀ) V[0..p],   p = positions[t], K and V those of t's own sequence.

q: [T, heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim]; heads = groups * kv_heads,
and query head h reads KV head h // groups. The keys of the T tokens themselves are in the cache already.

The reference gathers whole blocks, so a sequence's keys are padded to a multiple of the block size, and a mask made from
the true positions hides what lies beyond. All that depends on the step alone (which blocks, which mask) is prepared once
and shared by the layers. Sequences with few queries are padded into one batch; long prefill chunks are computed each on
their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of one forward stand; B sequences, whose tokens follow one another in the batch."""

    positions: Tensor  # [T] int64, true positions (device); padding tokens have position 0 and slot 0
    slot_mapping: Tensor  # [T] int64 into the flattened cache; in block 0 for padding
    block_tables: Tensor  # [B, max_blocks] int64, one row a sequence of this forward, in token order
    query_lens: tuple[int, ...]  # host, per sequence, each >= 1; sum = T
    context_bounds: tuple[int, ...]  # host upper bound of KV length per sequence after this forward
    block_size: int
