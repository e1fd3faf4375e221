"""Every attention backend against softmax written out per token and head, over shuffled blocks and mixed batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specserve_kernels.attention.backends import BACKENDS
from specserve_kernels.attention.paged import AttentionMetadata, AttentionShape, paged_attention, prepare
from specserve_kernels.tolerances import OP


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens before, queries, slack of the context bound); layers of each window share what is
    prepared."""

    sequences: tuple[tuple[int, int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    windows: tuple[int | None, ...] = (None,)
    seed: int = 0


@dataclass(frozen=True)
class Where:
    """A backend by name, and the device on which it is tested."""

    backend: str
    device: torch.device


@pytest.fixture(params=BACKENDS)
def where(request: pytest.FixtureRequest) -> Where:
    device = torch.device("cpu") if request.param == "torch" else request.getfixturevalue("device")
    return Where(request.param, device)


def make(case: Case) -> tuple[AttentionMetadata, list[torch.Tensor]]:
    """The metadata and q, k_cache, v_cache, on the CPU. The tables of other rows lie between those that are read."""
    generator = torch.Generator().manual_seed(case.seed)
    blocks_each = [-(-(before + n + slack) // case.block_size) for before, n, slack in case.sequences]
    width, count = max(blocks_each) + 1, sum(blocks_each) + 2
    order = torch.randperm(count - 1, generator=generator) + 1  # physical blocks, never block 0
    rows = torch.randperm(len(case.sequences) + 2, generator=generator)[: len(case.sequences)]
    tables = torch.full((len(case.sequences) + 2, width), count - 1, dtype=torch.int64)
    for row, start, n in zip(rows, itertools.accumulate(blocks_each, initial=0), blocks_each, strict=False):
        tables[row, :n] = order[start : start + n]
    owners = torch.tensor([(i, before + j) for i, (before, n, _) in enumerate(case.sequences) for j in range(n)])
    sequence, positions = owners.T.contiguous()
    slots = tables[rows[sequence], positions // case.block_size] * case.block_size + positions % case.block_size
    lens = tuple(n for _, n, _ in case.sequences)
    meta = AttentionMetadata(
        positions, slots, tables, rows, torch.tensor([0, *itertools.accumulate(lens)]), lens,
        tuple(before + n + slack for before, n, slack in case.sequences), case.block_size,
    )  # fmt: skip
    caches = (count * case.block_size, case.kv_heads, case.head_dim)
    shapes = ((len(owners), case.heads, case.head_dim), caches, caches)
    return meta, [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]


def oracle(
    case: Case, meta: AttentionMetadata, tensors: list[torch.Tensor], scale: float, window: int | None
) -> torch.Tensor:
    q, k_cache, v_cache = (tensor.double() for tensor in tensors)
    expected = torch.empty_like(q)
    for sequence, (first, last) in enumerate(itertools.pairwise(meta.query_start.tolist())):
        table = meta.block_tables[meta.rows[sequence]]
        for token in range(first, last):
            position = int(meta.positions[token])
            keys = torch.arange(0 if window is None else max(0, position - window + 1), position + 1)
            slots = table[keys // case.block_size] * case.block_size + keys % case.block_size
            for head in range(case.heads):
                kv_head = head // (case.heads // case.kv_heads)
                weights = torch.softmax(k_cache[slots, kv_head] @ q[token, head] * scale, 0)
                expected[token, head] = weights @ v_cache[slots, kv_head]
    return expected


def to_device(meta: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    names = ("positions", "slot_mapping", "block_tables", "rows", "query_start")
    return replace(meta, **{name: getattr(meta, name).to(device) for name in names})


def check(case: Case, where: Where) -> None:
    shape = AttentionShape(case.heads, case.kv_heads, case.head_dim, case.dtype)
    if not BACKENDS[where.backend].takes(shape, case.block_size):
        pytest.skip("not of this backend")
    meta, tensors = make(case)
    prepared = prepare(to_device(meta, where.device), shape, where.backend)
    q, k_cache, v_cache = (tensor.to(where.device) for tensor in tensors)
    rtol, atol = OP[case.dtype]
    for window in case.windows:
        actual = paged_attention(q, k_cache, v_cache, prepared, 0.3, window).cpu()
        expected = oracle(case, meta, tensors, 0.3, window)
        assert actual.dtype == case.dtype
        torch.testing.assert_close(actual, expected.to(case.dtype), rtol=rtol, atol=atol)


MIXES = {
    "decode": ((6, 1, 0),),
    "first token": ((0, 1, 0),),
    "decodes of other lengths": ((0, 1, 1), (11, 1, 3), (4, 1, 0)),
    "verifications": ((5, 5, 2), (9, 5, 0)),
    "verifications and decodes": ((5, 5, 2), (9, 1, 0), (0, 3, 7)),
    "prefill": ((0, 23, 0),),
    "chunk": ((13, 18, 5),),
    "everything": ((7, 1, 4), (3, 4, 2), (0, 21, 0), (8, 1, 1), (10, 17, 0), (0, 17, 0)),
    "more decodes than padding pays for": (*(((2, 1, 0),) * 9), (0, 16, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, dtype: torch.dtype, where: Where) -> None:
    check(Case(MIXES[mix], dtype=dtype), where)


@pytest.mark.parametrize("mix", MIXES)
def test_windows(mix: str, where: Where) -> None:
    check(Case(MIXES[mix], windows=(4, None, 1, 100, 4)), where)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize(("head_dim", "block_size"), [(6, 3), (16, 16), (2, 1)])
def test_shapes(heads: int, kv_heads: int, head_dim: int, block_size: int, where: Where) -> None:
    check(Case(MIXES["everything"], heads, kv_heads, head_dim, block_size), where)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequences=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 5, 16]),
    window=st.none() | st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_mix(
    where: Where, sequences: list[tuple[int, int, int]], block_size: int, window: int | None, seed: int
) -> None:
    case = Case(tuple(sequences), heads=2, kv_heads=1, head_dim=4, block_size=block_size, windows=(window,), seed=seed)
    check(case, where)


def test_padding_tokens_are_finite_and_change_nobody(where: Where) -> None:
    """A padding row has position 0, slot 0 and a table of zeros."""
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.randn(2, 12, 1, 4, generator=generator).to(where.device)
    q = torch.randn(4, 2, 4, generator=generator).to(where.device)
    positions = torch.tensor([5, 0, 0, 0])
    tables = torch.tensor([[0, 0], [2, 1]])

    def attend(sequences: int, lens: tuple[int, ...]) -> torch.Tensor:
        tokens = sum(lens)
        meta = AttentionMetadata(
            positions[:tokens],
            torch.zeros(tokens, dtype=torch.int64),
            tables,
            torch.tensor([1, 0, 0])[:sequences],
            torch.tensor([0, *itertools.accumulate(lens)]),
            lens,
            (6, 1, 1)[:sequences],
            4,
        )
        prepared = prepare(to_device(meta, where.device), AttentionShape(2, 1, 4, q.dtype), where.backend)
        return paged_attention(q[:tokens], k_cache, v_cache, prepared, 0.5)

    padded = attend(3, (1, 1, 2))
    assert padded.isfinite().all()
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(padded[:1], attend(1, (1,)), rtol=rtol, atol=atol)


def ragged(meta: AttentionMetadata, tokens: int, sequences: int, max_query_len: int) -> AttentionMetadata:
    """The same with lengths on the device alone, and room for so many tokens and sequences."""
    more = tokens - meta.positions.shape[0]
    empty = sequences - meta.rows.shape[0]
    pad = torch.nn.functional.pad
    return replace(
        meta,
        positions=pad(meta.positions, (0, more)),
        slot_mapping=pad(meta.slot_mapping, (0, more)),
        rows=pad(meta.rows, (0, empty)),
        query_start=torch.cat((meta.query_start, meta.query_start[-1:].expand(empty))),
        query_lens=None,
        context_bounds=(max(meta.context_bounds),) * sequences,
        max_query_len=max_query_len,
    )


RAGGED = {
    "decodes": ((6, 1, 0), (0, 1, 0), (90, 1, 2)),
    "verifications": ((5, 5, 2), (9, 1, 0), (0, 16, 3)),
    "chunks": ((13, 18, 5), (0, 40, 0)),
    "everything": MIXES["everything"],
}


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (7, 0), (0, 3), (33, 70)])  # beyond what is there
@pytest.mark.parametrize("mix", RAGGED)
def test_ragged(mix: str, tokens: int, sequences: int, device: torch.device) -> None:
    """Lengths that only the device knows: what belongs to no sequence gets 0, all others what they always get."""
    case = Case(RAGGED[mix], windows=(None, 4), block_size=8)
    shape = AttentionShape(case.heads, case.kv_heads, case.head_dim, case.dtype)
    meta, (q, k_cache, v_cache) = make(case)
    count, longest = len(q), max(meta.query_lens or ())
    padded = torch.cat((q, torch.full((tokens, *q.shape[1:]), float("nan")))).to(device)
    expected = [oracle(case, meta, [q, k_cache, v_cache], 0.3, window) for window in case.windows]
    rtol, atol = OP[case.dtype]
    for bound in {longest, count + tokens}:
        room = ragged(meta, count + tokens, len(case.sequences) + sequences, bound)
        prepared = prepare(to_device(room, device), shape, "triton")
        for window, wanted in zip(case.windows, expected, strict=True):
            out = paged_attention(padded, k_cache.to(device), v_cache.to(device), prepared, 0.3, window).cpu()
            torch.testing.assert_close(out[:count], wanted.to(case.dtype), rtol=rtol, atol=atol)
            assert not out[count:].any()


def test_ragged_with_nobody_there(device: torch.device) -> None:
    meta, (q, k_cache, v_cache) = make(Case(MIXES["chunk"]))
    empty = replace(ragged(meta, 18, 3, 18), query_start=torch.zeros(4, dtype=torch.int64))
    prepared = prepare(to_device(empty, device), AttentionShape(4, 2, 8, q.dtype), "triton")
    assert not paged_attention(q.to(device), k_cache.to(device), v_cache.to(device), prepared, 0.3).any()


def test_a_bound_beyond_the_block_table_is_our_bug() -> None:
    one = torch.tensor([0])
    meta = AttentionMetadata(one, one + 4, torch.tensor([[1]]), one, torch.tensor([0, 1]), (1,), (5,), 4)
    with pytest.raises(AssertionError, match="block table"):
        prepare(meta, AttentionShape(1, 1, 4, torch.float32))
