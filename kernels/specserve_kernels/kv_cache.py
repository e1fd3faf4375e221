"""Writing new keys and values into the paged cache.

k, v: [T, kv_heads, head_dim]; k_cache, v_cache: [num_blocks * block_size, kv_heads, head_dim] of the same dtype;
slot_mapping: [T] int64. Slots in block 0 (slot < block_size) are where padding, undrafted and over-long rows write:
several tokens may share one, and nobody reads them.
"""

from __future__ import annotations

from torch import Tensor

from specserve_kernels.dispatch import backend


def write_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


_IMPLEMENTATIONS = {"torch": write_kv_ref}


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write token t's key and value to slot slot_mapping[t], in place."""
    assert k.shape == v.shape and k_cache.shape[1:] == k.shape[1:], (k.shape, v.shape, k_cache.shape)
    _IMPLEMENTATIONS[backend(k, _IMPLEMENTATIONS)](k, v, k_cache, v_cache, slot_mapping)
