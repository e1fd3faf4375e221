"""Prefill attention over pages against a float64 softmax, query by query, over sequences scattered in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from specserve_kernels.attention import prefill_hopper as attention_prefill_hopper
from specserve_kernels.attention.prefill import Tile, prefill_attention_triton
from specserve_kernels.attention.prefill_tiles import list_tiles
from specserve_kernels.tolerances import OP


@dataclass(frozen=True)
class Case:
    """Sequences as (keys before the chunk, queries of the chunk)."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    tile: Tile | None = None


SMALL = Tile(16, 16, 4, 1)
CASES = {
    "one": Case(((0, 37),)),
    "one token": Case(((0, 1),)),
    "prefix": Case(((29, 40),), tile=SMALL),
    "several": Case(((0, 21), (50, 3), (16, 17), (5, 1)), tile=SMALL),
    "window": Case(((45, 30),), window=9, tile=SMALL),
    "window of one": Case(((3, 20),), window=1, tile=SMALL),
    "wide window": Case(((20, 25), (0, 12)), window=33, tile=SMALL),
    "pages of 5": Case(((13, 22), (0, 9)), block_size=5, tile=SMALL),
    "groups of 1": Case(((7, 19),), heads=2, kv_heads=2, tile=SMALL),
    "groups of 3": Case(((7, 19), (0, 6)), heads=6, kv_heads=2, tile=SMALL),
    "groups of 7": Case(((11, 13),), heads=7, kv_heads=1, tile=SMALL),
    "head_dim 80": Case(((9, 23),), head_dim=80, tile=SMALL),
    "head_dim 128": Case(((9, 23),), head_dim=128),
    "bf16": Case(((35, 90),), dtype=torch.bfloat16, head_dim=128, heads=8, kv_heads=2),
    "bf16 few": Case(((35, 9), (0, 12)), dtype=torch.bfloat16, heads=8, kv_heads=2),
    "bf16 window": Case(((70, 60), (0, 5)), dtype=torch.bfloat16, window=40, tile=Tile(32, 16, 4, 1)),
    "fp16": Case(((0, 45),), dtype=torch.float16, head_dim=128),
}


HOPPER_CASES = {
    "one tile": Case(((0, 20),), dtype=torch.bfloat16, head_dim=128),
    "several": Case(
        ((500, 100), (0, 300), (37, 17), (129, 1)), dtype=torch.bfloat16, head_dim=128, heads=8, kv_heads=2
    ),
    "head_dim 64": Case(((500, 100), (0, 300)), dtype=torch.bfloat16, heads=14, kv_heads=2),
    "pages of 256": Case(((0, 700),), dtype=torch.float16, head_dim=128, block_size=256),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_prefill_attention(case: Case, device: torch.device) -> None:
    _check(case, device, partial(prefill_attention_triton, tile=case.tile))


@pytest.mark.parametrize("programs", [2, 3, None])
@pytest.mark.parametrize("case", HOPPER_CASES.values(), ids=HOPPER_CASES.keys())
def test_on_hopper(case: Case, programs: int | None, device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a Hopper GPU: Gluon is not interpreted")

    def attention(q, k_cache, v_cache, tables, rows, query_start, positions, out, *, first_seq, num_seqs, **rest):  # type: ignore[no-untyped-def]
        lens = query_start[first_seq : first_seq + num_seqs + 1].diff().tolist()
        tile_q = attention_prefill_hopper.tile_queries(case.heads // case.kv_heads)
        tiles = list_tiles(query_start, rows, positions, tuple(lens), first_seq, tile_q)
        attention_prefill_hopper.prefill_attention_hopper(
            q, k_cache, v_cache, tables, tiles, out,
            block_size=rest["block_size"], scale=rest["scale"], programs=programs,
        )  # fmt: skip

    _check(case, device, attention)


@pytest.mark.parametrize("tile_q", [1, 7, 32])
def test_listed_tiles(tile_q: int, device: torch.device) -> None:
    sequences = ((0, 40), (5, 33), (100, 1), (3, 70), (0, 7))  # the first one is of another run
    lens = [count for _, count in sequences]
    starts = [0, *itertools.accumulate(lens)]
    query_start = torch.tensor(starts, device=device)
    positions = torch.cat([torch.arange(before, before + count) for before, count in sequences]).to(device)
    rows = torch.tensor([4, 9, 2, 7, 0], device=device)
    listed = list_tiles(query_start, rows, positions, tuple(lens[1:]), 1, tile_q)
    tiles = listed.records[:, :6].tolist()
    assert listed.num_tiles.item() == len(tiles)
    expected = [
        [starts[i], first, count, before, rows[i].item(), before + min(first + tile_q, count)]
        for i, (before, count) in enumerate(sequences)
        if i > 0
        for first in range(0, count, tile_q)
    ]
    assert sorted(tiles) == sorted(expected)
    assert [tile[5] for tile in tiles] == sorted((tile[5] for tile in tiles), reverse=True)


def _check(case: Case, device: torch.device, attention: Callable[..., None]) -> None:
    lens = [count for _, count in case.sequences]
    contexts = [before + count for before, count in case.sequences]
    q, k_cache, v_cache, tables, rows = _inputs(case, contexts, sum(lens), device)
    query_start = torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], device=device)
    positions = torch.cat([torch.arange(before, before + count) for before, count in case.sequences]).to(device)
    out = torch.full_like(q, float("nan"))
    scale = 0.7 * case.head_dim**-0.5
    first = 0
    for count in (len(lens) - len(lens) // 2, len(lens) // 2):  # all of them, in two calls where there are two
        if count:
            attention(
                q, k_cache, v_cache, tables, rows, query_start, positions, out, first_seq=first, num_seqs=count,
                max_query_len=max(lens[first : first + count]) + 3, max_context=max(contexts[first : first + count]),
                block_size=case.block_size, scale=scale, window=case.window,
            )  # fmt: skip
        first += count
    starts = query_start.tolist()
    for i, (before, count) in enumerate(case.sequences):
        keys = torch.arange(before + count, device=device)
        slots = tables[rows[i]][keys // case.block_size] * case.block_size + keys % case.block_size
        expected = _oracle(q[starts[i] : starts[i] + count], k_cache[slots], v_cache[slots], scale, case.window)
        rtol, atol = OP[case.dtype]
        torch.testing.assert_close(out[starts[i] : starts[i] + count].double(), expected, rtol=rtol, atol=atol)


def _inputs(case: Case, contexts: list[int], tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """q as a view of a wider product, the caches, and the tables of more rows than are used, in another order."""
    torch.manual_seed(0)
    blocks = [-(-context // case.block_size) for context in contexts]
    free = (torch.randperm(sum(blocks)) + 1).split(blocks)
    rows = torch.randperm(len(contexts) + 2)[: len(contexts)]
    tables = torch.full((len(contexts) + 2, max(blocks) + 1), 10**9)  # what lies beyond a sequence is not looked at
    for i, mine in enumerate(free):
        tables[rows[i], : blocks[i]] = mine
    slots = (sum(blocks) + 1) * case.block_size
    q = torch.randn(tokens, case.heads + 2, case.head_dim)[:, : case.heads]
    k, v = torch.randn(2, slots, case.kv_heads, case.head_dim).unbind()
    q, k, v = (t.to(device, case.dtype) for t in (q, k, v))
    return q, k, v, tables.to(device), rows.to(device)


def _oracle(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [n, heads, d] after len(k) − n earlier keys; k, v [keys, kv_heads, d] → [n, heads, d] float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(groups, 1) for t in (k, v))
    outs = []
    for i in range(q.shape[0]):
        last = k.shape[0] - q.shape[0] + i + 1
        first = 0 if window is None else max(0, last - window)
        scores = torch.einsum("hd,khd->hk", q[i].double(), k[first:last]) * scale
        outs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[first:last]))
    return torch.stack(outs)
