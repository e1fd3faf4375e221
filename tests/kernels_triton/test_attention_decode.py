"""Decode attention in Triton against softmax in float64, over parts, row blocks, shapes and views."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from specserve_kernels.attention.decode import DecodeRun, Tile, decode_attention_triton, prepare_decode
from specserve_kernels.attention.interface import AttentionMetadata, AttentionShape
from specserve_kernels.attention.plan import FIELDS, Queries, capacity_of, multiprocessors
from specserve_kernels.tolerances import OP

SMALL = Tile(16, 4, 3, 3)  # so that few keys are many tiles


@dataclass(frozen=True)
class Inputs:
    """`lens`: (KV length, queries) of each sequence; everything else on the device."""

    lens: tuple[tuple[int, int], ...]
    shape: AttentionShape
    meta: AttentionMetadata
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    @property
    def queries(self) -> Queries:
        return Queries(1, max(queries for _, queries in self.lens))

    def run(self, windows: tuple[int | None, ...] = (None,), tile: Tile | None = SMALL) -> list[torch.Tensor]:
        run = prepare_decode(self.meta, self.shape, 0, len(self.lens), self.queries, tile)
        return [self.attend(run, window) for window in windows]

    def attend(self, run: DecodeRun, window: int | None) -> torch.Tensor:
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        decode_attention_triton(self.q, self.k_cache, self.v_cache, run, out, self.shape.head_dim**-0.5, window)
        assert not run.counters.any()
        return out

    def expected(self, window: int | None = None) -> torch.Tensor:
        groups = self.shape.heads // self.shape.kv_heads
        outs = []
        for i, (first, last) in enumerate(itertools.pairwise(self.meta.query_start.tolist())):
            keys = torch.arange(self.lens[i][0], device=self.q.device)
            size = self.meta.block_size
            slots = self.meta.block_tables[self.meta.rows[i], keys // size] * size + keys % size
            k, v = (cache[slots].double().repeat_interleave(groups, 1) for cache in (self.k_cache, self.v_cache))
            scores = torch.einsum("qhd,khd->hqk", self.q[first:last].double(), k) * self.shape.head_dim**-0.5
            at = self.meta.positions[first:last, None]
            hidden = (keys > at) if window is None else (keys > at) | (keys <= at - window)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        return torch.cat(outs)


def inputs(
    device: torch.device,
    lens: tuple[tuple[int, int], ...],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    slack: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    width = max(-(-(length + slack) // block_size) for length, _ in lens)
    tables = (torch.randperm(width * len(lens), generator=generator) + 1).view(len(lens), width)
    counts = tuple(queries for _, queries in lens)
    positions = torch.cat([torch.arange(length - queries, length) for length, queries in lens])
    rows = torch.arange(len(lens) - 1, -1, -1)
    starts = torch.tensor([0, *itertools.accumulate(counts)])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    slots = (width * len(lens) + 1) * block_size
    qkv = normal(sum(counts), heads + 2 * kv_heads, head_dim)  # the layers pass q as a view of all heads
    meta = AttentionMetadata(
        positions.to(device), positions.to(device), tables.to(device), rows.to(device), starts.to(device), counts,
        tuple(length + slack for length, _ in lens), block_size,
    )  # fmt: skip
    shape = AttentionShape(heads, kv_heads, head_dim, dtype)
    caches = normal(slots, kv_heads, head_dim), normal(slots, kv_heads, head_dim)
    return Inputs(lens, shape, meta, qkv[:, :heads], *caches)


def check(given: Inputs, windows: tuple[int | None, ...] = (None,), tile: Tile | None = SMALL) -> None:
    rtol, atol = OP[given.shape.dtype]
    for window, out in zip(windows, given.run(windows, tile), strict=True):
        torch.testing.assert_close(out, given.expected(window).to(out.dtype), rtol=rtol, atol=atol)


ONE_LONG = ((100, 1),)
UNEQUAL = ((90, 1), (3, 1), (17, 1), (1, 1))
VERIFICATIONS = ((64, 5), (5, 5), (33, 1), (20, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lens", [ONE_LONG, UNEQUAL, VERIFICATIONS])
def test_parts_add_up(device: torch.device, lens: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
    check(inputs(device, lens, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (5, 1), (16, 1), (12, 4)])
def test_groups(device: torch.device, heads: int, kv_heads: int) -> None:
    check(inputs(device, ((60, 2), (40, 1)), heads=heads, kv_heads=kv_heads))


def test_more_rows_than_a_tile(device: torch.device) -> None:
    check(inputs(device, ((60, 16), (41, 16)), heads=8, kv_heads=1, dtype=torch.bfloat16))
    check(inputs(device, ((60, 16), (41, 3)), heads=3, kv_heads=1))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_dims_with_the_tiles_of_production(device: torch.device, head_dim: int, dtype: torch.dtype) -> None:
    check(inputs(device, ((150, 1), (20, 4)), head_dim=head_dim, dtype=dtype), tile=None)


@pytest.mark.parametrize("block_size", [1, 5, 32, 256])
def test_block_sizes(device: torch.device, block_size: int) -> None:
    check(inputs(device, ((70, 1), (33, 3)), block_size=block_size))


def test_windows_of_one_forward(device: torch.device) -> None:
    check(inputs(device, ((100, 4), (9, 1), (50, 2))), (7, None, 1, 40, 1000, 7))


def test_a_far_bound_changes_nothing(device: torch.device) -> None:
    """The host's bound is what a captured graph must be ready for; the lengths are the device's."""
    check(inputs(device, VERIFICATIONS, slack=3000))


def test_equal_inputs_give_equal_bits(device: torch.device) -> None:
    given = inputs(device, ((100, 3), (70, 1)))
    first, *others = given.run((None,) * 3)
    assert all(torch.equal(first, other) for other in others)


def test_the_bits_of_a_sequence_are_its_own(device: torch.device) -> None:
    """Other lengths beside it, in a batch of as many, change nothing (where there is room for all parts)."""
    given = inputs(device, ((300, 1), (200, 1), (40, 1), (40, 1)))
    positions = given.meta.positions.clone()
    positions[1:3] = torch.tensor([20, 5], device=device)
    other = replace(given, meta=replace(given.meta, positions=positions))
    (out,), (beside,) = given.run(), other.run()
    assert torch.equal(out[0], beside[0]) and not torch.equal(out[1], beside[1])


def test_room_for_more_sequences_changes_nothing(device: torch.device) -> None:
    """A captured graph has room for as many sequences as tokens; most are empty, and keys are cut as without them."""
    given = inputs(device, ((300, 2), (200, 3)))
    meta, more = given.meta, 40
    wide = replace(
        meta, rows=torch.cat([meta.rows, meta.rows[:1].expand(more)]),
        query_start=torch.cat([meta.query_start, meta.query_start[-1:].expand(more)]),
        context_bounds=(*meta.context_bounds, *(300,) * more), query_lens=None,
    )  # fmt: skip
    runs = [prepare_decode(one, given.shape, 0, count, given.queries, SMALL) for one, count in ((meta, 2), (wide, 42))]
    few, many = (given.attend(run, None) for run in runs)
    assert torch.equal(few, many)
    items = [[item[: FIELDS - 1] for item in run.plans[None].tolist() if item[4] > 0] for run in runs]
    assert items[0] == items[1] and len(items[0]) > 2


@pytest.mark.parametrize("lens", [ONE_LONG, UNEQUAL, ((500, 1),) * 3 + ((7, 2),) * 9])
def test_items_cover_every_key_once(device: torch.device, lens: tuple[tuple[int, int], ...]) -> None:
    given = inputs(device, lens)
    run = prepare_decode(given.meta, given.shape, 0, len(lens), given.queries, SMALL)
    given.attend(run, None)
    items = run.plans[None].tolist()
    used = [item for item in items if item[4] > 0]
    assert len(items) <= capacity_of(len(lens), 2, 10**6, 3 * multiprocessors(device))
    for i, first_token in enumerate(given.meta.query_start.tolist()[:-1]):
        parts = [item for item in used if item[0] == first_token]
        assert [part[3] for part in parts] == [0, *(part[4] for part in parts[:-1])]
        assert parts[-1][4] == lens[i][0]
        first_item = used.index(parts[0])
        assert all(part[1:3] == [lens[i][1], int(given.meta.rows[i])] for part in parts)
        assert all(part[5 : FIELDS - 1] == [len(parts), first_item] for part in parts)
