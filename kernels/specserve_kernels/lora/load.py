"""An adapter's matrices from its blob to their places in a slot, all modules in one launch.

Module i has the A [rank, in_features] and the B [width, rank] at these elements of the flat `blob`:

    places [n, 3] int64    of A, of B; the rank (0: no LoRA, the offsets are not read)

and of the flat `store`, blob's dtype, whatever the slot (for the kernel, they may lead out of it):

    layout [n, 7] int64    slot 0's A and Bᵀ; from one slot to the next of A and of Bᵀ; in_features, width, out_features

A lies there as it is, in rows of in_features. Bᵀ is a block of columns of rows [·, out_features], beside those of the
other parts of a merged linear. Both are zero from the module's rank to `slot_rank`, so that whoever multiplies rounds
ranks up to it. slot and slot_rank are known to the host; places are an adapter's and layout a model's own, made once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import tl, triton

_PROGRAMS = 32  # a module. They are short, so that a step beside them never waits long for a place on the device.
_BLOCK = 2048  # elements of A at once
_RANKS, _COLUMNS = 16, 128  # of Bᵀ at once


def load_slot_ref(store: Tensor, blob: Tensor, places: Tensor, layout: Tensor, slot: int, slot_rank: int) -> None:
    """The copies above in torch, one after the other."""
    start = int(store.storage_offset())
    for (from_a, from_b, rank), row in zip(places.tolist(), layout.tolist(), strict=True):
        to_a, to_b, step_a, step_b, in_features, width, out_features = row
        a = store[to_a + slot * step_a :][: slot_rank * in_features].view(slot_rank, in_features)
        a[rank:].zero_()
        a[:rank] = blob[from_a : from_a + rank * in_features].view(rank, in_features)
        b = store.as_strided((slot_rank, width), (out_features, 1), start + to_b + slot * step_b)
        b[rank:].zero_()
        b[:rank] = blob[from_b : from_b + width * rank].view(width, rank).t()


@triton.jit
def _copy_a(to, source, size, slot_size, BLOCK: tl.constexpr):
    """This program's blocks of A: `size` elements, then zeros up to `slot_size`."""
    first = tl.program_id(1) * BLOCK
    while first < slot_size:
        i = first + tl.arange(0, BLOCK)
        tl.store(to + i, tl.load(source + i, mask=i < size, other=0.0), mask=i < slot_size)
        first += tl.num_programs(1) * BLOCK


@triton.jit
def _copy_b(to, source, rank, slot_rank, width, out_features, RANKS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tiles of Bᵀ, zeros from `rank` on. Read as B lies, so that both sides are whole sectors."""
    c = tl.arange(0, COLUMNS)
    tiles = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(1)
    while tile < tiles * tl.cdiv(slot_rank, RANKS):
        column, r = tile % tiles * COLUMNS + c, tile // tiles * RANKS + tl.arange(0, RANKS)
        inside = (column < width)[:, None] & (r < rank)[None, :]
        b = tl.load(source + column[:, None] * rank + r[None, :], mask=inside, other=0.0)
        inside = (r < slot_rank)[:, None] & (column < width)[None, :]
        tl.store(to + r[:, None] * out_features + column[None, :], tl.trans(b), mask=inside)
        tile += tl.num_programs(1)


@triton.jit(do_not_specialize=["slot", "slot_rank"])
def _load_kernel(
    store, blob, places, layout, slot, slot_rank,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program: its share of one module. Sizes and offsets are multiples of ALIGN elements, but for the rank."""
    place, row = places + tl.program_id(0) * 3, layout + tl.program_id(0) * 7
    source_a = blob + tl.multiple_of(tl.load(place), ALIGN)
    source_b = blob + tl.multiple_of(tl.load(place + 1), ALIGN)
    to_a = store + tl.multiple_of(tl.load(row) + slot * tl.load(row + 2), ALIGN)
    to_b = store + tl.multiple_of(tl.load(row + 1) + slot * tl.load(row + 3), ALIGN)
    rank = tl.load(place + 2).to(tl.int32)
    in_features = tl.multiple_of(tl.load(row + 4).to(tl.int32), ALIGN)
    width = tl.multiple_of(tl.load(row + 5).to(tl.int32), ALIGN)
    out_features = tl.multiple_of(tl.load(row + 6).to(tl.int32), ALIGN)
    _copy_a(to_a, source_a, rank * in_features, slot_rank * in_features, BLOCK)
    if rank % 8 == 0:  # a hint would hold for `rank` in the other branch too
        _copy_b(to_b, source_b, rank // 8 * 8, slot_rank, width, out_features, RANKS, COLUMNS)
    else:
        _copy_b(to_b, source_b, rank, slot_rank, width, out_features, RANKS, COLUMNS)


def load_slot_triton(
    store: Tensor, blob: Tensor, places: Tensor, layout: Tensor, slot: int, slot_rank: int, align: int = 1
) -> None:
    _load_kernel[(places.shape[0], _PROGRAMS)](
        store, blob, places, layout, slot, slot_rank,
        BLOCK=_BLOCK, RANKS=_RANKS, COLUMNS=_COLUMNS, ALIGN=align, num_warps=4,
    )  # fmt: skip


def _load_slot_torch(
    store: Tensor, blob: Tensor, places: Tensor, layout: Tensor, slot: int, slot_rank: int, align: int
) -> None:
    load_slot_ref(store, blob, places, layout, slot, slot_rank)


_IMPLEMENTATIONS = {"torch": _load_slot_torch, "triton": load_slot_triton}


def load_slot(
    store: Tensor, blob: Tensor, places: Tensor, layout: Tensor, slot: int, slot_rank: int, align: int = 1
) -> None:
    """The copies above, on the current stream. All tensors contiguous, on one device. `align`, a power of 2: every
    offset and size in `places` and `layout` is a multiple of it, the ranks aside, and so are the tensors' addresses."""
    assert places.dtype == layout.dtype == torch.int64, (places.dtype, layout.dtype)
    assert places.shape[1:] == (3,), places.shape
    assert layout.shape == (places.shape[0], 7), (layout.shape, places.shape)
    assert store.dtype == blob.dtype, (store.dtype, blob.dtype)
    _IMPLEMENTATIONS[backend(store, _IMPLEMENTATIONS)](store, blob, places, layout, slot, slot_rank, align)
