"""Which queries a program of the prefill attention takes: sequences are cut into tiles of TILE_Q queries.

The kernels find a tile's sequence on the device. attention_prefill_hopper reads tiles from a list, made once for all
layers of a forward: the longest first, because programs that take several tiles must be done together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched


class TileList(NamedTuple):
    """`records` [N, FIELDS] int32, those of tiles first, most keys first; `num_tiles` [] int64: how many are tiles."""

    records: Tensor
    num_tiles: Tensor


SEQS = 64  # query starts looked at together while a program finds its sequence
FIELDS = 8
"""int32 numbers a tile has: the sequence's first token, the tile's first query, the sequence's queries, its keys before
them, its row of the block tables, and the keys that the tile sees; two are not used, so that it is 32 bytes."""


@triton.jit
def locate(query_start, first_seq, num_seqs, tile, TILE_Q: tl.constexpr, SEQS: tl.constexpr):
    """Sequence of the flat `tile` and the tile's place in it.

    Sequence first_seq + i gets the tiles from (its first token) // TILE_Q + i on: never too few, at most one too many.
    """
    origin = tl.load(query_start + first_seq)
    count = 0
    for start in range(0, num_seqs, SEQS):
        i = start + tl.arange(0, SEQS)
        first = tl.load(query_start + first_seq + i, mask=i < num_seqs, other=0) - origin
        count += tl.sum(((first // TILE_Q + i <= tile) & (i < num_seqs)).to(tl.int32))
    seq = first_seq + count - 1
    first = tl.load(query_start + seq)
    return seq, first, tile - ((first - origin) // TILE_Q).to(tl.int32) - (count - 1)


@relaunched
@triton.jit(
    do_not_specialize=["first_seq", "num_seqs", "shortest"],
    do_not_specialize_on_alignment=["rows", "query_start", "positions"],
)
def _tiles_kernel(
    query_start,
    rows,
    positions,
    tiles,
    keys_ptr,
    first_seq,
    num_seqs,
    shortest,
    TILE_Q: tl.constexpr,
    SEQS: tl.constexpr,
    FIELDS: tl.constexpr,
):
    flat = tl.program_id(0)
    seq, first_token, tile = locate(query_start, first_seq, num_seqs, flat, TILE_Q, SEQS)
    query_len = (tl.load(query_start + seq + 1) - first_token).to(tl.int32)
    first_query = tile * TILE_Q
    real = (first_query < query_len) & (query_len >= shortest)
    base = tl.load(positions + first_token, mask=real, other=0).to(tl.int32)  # behind an empty sequence is no token
    keys = tl.where(real, base + tl.minimum(first_query + TILE_Q, query_len), 0)
    place = tiles + flat * FIELDS
    tl.store(place, first_token.to(tl.int32))
    tl.store(place + 1, first_query)
    tl.store(place + 2, query_len)
    tl.store(place + 3, base)
    tl.store(place + 4, tl.load(rows + seq).to(tl.int32))
    tl.store(place + 5, tl.maximum(keys, 1))  # who copies keys and who waits for them must agree, whatever the tile
    tl.store(keys_ptr + flat, keys)


def list_tiles(
    query_start: Tensor, rows: Tensor, positions: Tensor, query_lens: tuple[int, ...] | None, first_seq: int,
    tile_q: int, *, shortest: int = 1,
) -> TileList:  # fmt: skip
    """Tiles of the sequences first_seq …, which have `query_lens` queries; None: of all from first_seq on, with
    whatever queries the device knows of. Sequences of fewer than `shortest` queries have none."""
    if query_lens is None:
        num_seqs, tokens = rows.shape[0] - first_seq, positions.shape[0]
    else:
        num_seqs, tokens = len(query_lens), sum(query_lens)
    candidates = cdiv(tokens, tile_q) + num_seqs - 1
    tiles = torch.empty(candidates, FIELDS, dtype=torch.int32, device=rows.device)
    keys = torch.empty(candidates, dtype=torch.int32, device=rows.device)
    _tiles_kernel[(candidates,)](
        query_start, rows, positions, tiles, keys, first_seq, num_seqs, shortest,
        TILE_Q=tile_q, SEQS=SEQS, FIELDS=FIELDS, num_warps=1,
    )  # fmt: skip
    most = candidates if query_lens is None else sum(cdiv(length, tile_q) for length in query_lens)
    return TileList(tiles[keys.argsort(descending=True)[:most]], (keys > 0).sum())
