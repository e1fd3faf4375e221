"""An adapter's matrices from its blob to their places in a slot, all modules in one launch.

Row i of table [n, 8] int64 is a module: offsets in blob of its A [rank, in_features] and its B [width, rank], offsets
in store of its A [slot rank, in_features] and its Bᵀ [rank, width], then in_features, width, rank and the slot's rank.
store and blob are flat, of one dtype, on one device. A is zero from the module's rank to the slot's; what B then meets
does not matter. A module without LoRA has the rank 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import tl, triton

_PROGRAMS = 64  # a module
_BLOCK = 1024


def load_slot_ref(store: Tensor, blob: Tensor, table: Tensor) -> None:
    """The copies above in torch, one after the other."""
    for from_a, from_b, to_a, to_b, in_features, width, rank, slot_rank in table.tolist():
        store[to_a : to_a + slot_rank * in_features].zero_()
        store[to_a : to_a + rank * in_features] = blob[from_a : from_a + rank * in_features]
        b = blob[from_b : from_b + width * rank].view(width, rank)
        store[to_b : to_b + rank * width].view(rank, width).copy_(b.t())


@triton.jit
def _load_kernel(store, blob, table, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: every PROGRAMS-th block of A, then of Bᵀ, of one module."""
    row = table + tl.program_id(0) * 8
    from_a, from_b, to_a, to_b = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    in_features, width = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    rank, slot_rank = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    while first < slot_rank * in_features:
        i = first + tl.arange(0, BLOCK)
        value = tl.load(blob + from_a + i, mask=i < rank * in_features, other=0.0)
        tl.store(store + to_a + i, value, mask=i < slot_rank * in_features)
        first += PROGRAMS * BLOCK
    first = tl.program_id(1) * BLOCK
    while first < rank * width:
        i = first + tl.arange(0, BLOCK)
        value = tl.load(blob + from_b + i % width * rank + i // width, mask=i < rank * width, other=0.0)
        tl.store(store + to_b + i, value, mask=i < rank * width)
        first += PROGRAMS * BLOCK


def load_slot_triton(store: Tensor, blob: Tensor, table: Tensor) -> None:
    _load_kernel[(table.shape[0], _PROGRAMS)](store, blob, table, PROGRAMS=_PROGRAMS, BLOCK=_BLOCK, num_warps=4)


_IMPLEMENTATIONS = {"torch": load_slot_ref, "triton": load_slot_triton}


def load_slot(store: Tensor, blob: Tensor, table: Tensor) -> None:
    """The copies above. All tensors contiguous."""
    assert table.dtype == torch.int64, table.dtype
    assert table.shape[1:] == (8,), table.shape
    assert store.dtype == blob.dtype, (store.dtype, blob.dtype)
    _IMPLEMENTATIONS[backend(store, _IMPLEMENTATIONS)](store, blob, table)
