"""Writing new keys and values into the paged cache. A building block: layers call qkv.rotate_and_cache.

k, v: [T, kv_heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim] of the same dtype;
slot_mapping: [T] int64. Slots in block 0 (slot < block_size) are where padding, undrafted and over-long rows write:
several tokens may share one, and nobody reads them.
"""

from __future__ import annotations

from torch import Tensor


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write token t's key and value to slot slot_mapping[t], in place."""
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)
