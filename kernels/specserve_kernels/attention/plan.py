"""How the keys of short sequences are divided among programs, decided on the device.

A decode step must read every key once and be limited by memory alone, whether it holds one long sequence or a hundred
short ones. Keys are cut into items (one part of one sequence, for all KV heads) of nearly equal length
(flash-decoding, Dao et al. 2023, with the parts chosen from the true lengths), as long as suits the number of sequences
there are, or as much longer as it takes to have no more items than there is room for, about as many as fill the GPU.
Only the number of items that may exist is fixed on the host; so a captured graph suits any lengths and any number of
sequences up to its own, and programs without an item end at once. One plan serves all layers with the same window.

items: [capacity, FIELDS] int32, see `_plan_kernel`. Parts are cut at multiples of `tile` keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.attention.interface import AttentionMetadata
from specserve_kernels.language import power_of_2, tl, triton
from specserve_kernels.launch import relaunched


class Queries(NamedTuple):
    """Which sequences are planned: those with so many queries. Others, the empty ones too, get no items."""

    least: int
    most: int


FIELDS = 8
"""int32 numbers an item has: 32 bytes, one sector of memory."""
_NUMBERS = ["first_seq", "num_seqs", "least", "most", "window", "capacity", "kv_heads", "counters_each", "tile"]


@triton.jit
def _shortest_part(heads):
    """Keys below which a part is not worth its start, for sequences times KV heads: many sequences fill the GPU uncut,
    and a few must be cut although adding up their parts costs time."""
    return tl.where(heads <= 16, 128, tl.where(heads <= 64, 256, 512))


@relaunched
@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=["positions", "query_start", "rows"])
def _plan_kernel(
    positions,
    query_start,
    rows,
    items,
    counters,
    first_seq,
    num_seqs,
    least,
    most,
    window,
    capacity,
    kv_heads,
    counters_each,
    tile,
    SEQS: tl.constexpr,
    FIELDS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """One program. An item is (first token, queries, row of the block tables, first key, end of keys, parts of the
    sequence, first item of the sequence, 0); one without keys is empty. Sets the counters [capacity, counters_each]
    to 0."""
    i = tl.arange(0, SEQS)
    inside = i < num_seqs
    first = tl.load(query_start + first_seq + i, mask=inside, other=0)
    last = tl.load(query_start + first_seq + i + 1, mask=inside, other=0)
    inside &= (last - first >= least) & (last - first <= most)
    row = tl.load(rows + first_seq + i, mask=inside, other=0).to(tl.int32)
    end = tl.load(positions + last - 1, mask=inside, other=-1).to(tl.int32) + 1
    begin = tl.zeros([SEQS], dtype=tl.int32)
    if WINDOWED:
        oldest = tl.load(positions + first, mask=inside, other=0).to(tl.int32)
        begin = tl.maximum(oldest - window + 1, 0) // tile * tile
    tiles = (end - begin + tile - 1) // tile

    # Where there is room, a sequence's parts depend on its own length alone; else on the shortest part, in tiles, of
    # which there is room for all.
    part = tl.maximum(_shortest_part(tl.sum(inside.to(tl.int32)) * kv_heads) // tile, 1)
    enough = tl.maximum(tl.max(tiles), part)
    if tl.sum((tiles + part - 1) // part) <= capacity:  # as nearly always
        enough = part
    while part < enough:
        middle = (part + enough) // 2
        if tl.sum((tiles + middle - 1) // middle) <= capacity:
            enough = middle
        else:
            part = middle + 1

    parts = tl.maximum((tiles + part // 2) // part, 1)
    length = (tiles + parts - 1) // parts
    parts = tl.where(inside, (tiles + length - 1) // tl.maximum(length, 1), 0)
    first_item = tl.cumsum(parts, 0) - parts
    for j in range(0, tl.max(parts)):
        record = items + (first_item + j) * FIELDS
        used = j < parts
        start = begin + j * length * tile
        tl.store(record, first.to(tl.int32), mask=used)
        tl.store(record + 1, (last - first).to(tl.int32), mask=used)
        tl.store(record + 2, row, mask=used)
        tl.store(record + 3, start, mask=used)
        tl.store(record + 4, tl.minimum(start + length * tile, end), mask=used)
        tl.store(record + 5, parts, mask=used)
        tl.store(record + 6, first_item, mask=used)
    for unused in range(tl.sum(parts), capacity, SEQS):
        tl.store(items + (unused + i) * FIELDS + 4, 0, mask=unused + i < capacity)
    for counter in range(0, capacity * counters_each, SEQS):
        tl.store(counters + counter + i, 0, mask=counter + i < capacity * counters_each)


def capacity_of(num_seqs: int, kv_heads: int, max_tiles: int, programs: int) -> int:
    """Room for items of `num_seqs` sequences of at most `max_tiles` tiles in all; `programs` run on the GPU at once."""
    wave = max(1, programs // kv_heads)
    # Few sequences are cut into exactly one wave; many need more waves anyway, and equal parts matter less.
    capacity = wave if 2 * num_seqs <= wave else num_seqs + 2 * wave
    return max(num_seqs, min(capacity, max_tiles))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a small number for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def plan_triton(
    meta: AttentionMetadata,
    counters: Tensor,
    *,
    first_seq: int,
    num_seqs: int,
    queries: Queries,
    window: int | None,
    tile: int,
    kv_heads: int,
) -> Tensor:
    """The items of sequences first_seq … first_seq + num_seqs - 1, as far as they have `queries`; there must be room
    for each of those. counters: [capacity, KV heads * …] int32."""
    capacity, each = counters.shape
    items = torch.empty(capacity, FIELDS, dtype=torch.int32, device=counters.device)
    seqs = max(64, power_of_2(num_seqs))
    _plan_kernel[(1,)](
        meta.positions, meta.query_start, meta.rows, items, counters,
        first_seq, num_seqs, *queries, window or 0, capacity, kv_heads, each, tile,
        SEQS=seqs, FIELDS=FIELDS, WINDOWED=window is not None, num_warps=1 if seqs <= 64 else 4,
    )  # fmt: skip
    return items
