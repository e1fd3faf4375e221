"""Paged attention against softmax written out per token and head, over shuffled blocks and mixed batches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve_kernels.attention import AttentionMetadata, paged_attention, prepare
from specserve_kernels.tolerances import OP


@dataclass(frozen=True)
class Case:
    """Sequences as (tokens before, queries, slack of the context bound)."""

    sequences: tuple[tuple[int, int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    block_size: int = 4
    dtype: torch.dtype = torch.float64
    seed: int = 0


def run(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(paged_attention's result, the same per token and head in float64), each [T, heads, head_dim]."""
    generator = torch.Generator().manual_seed(case.seed)
    blocks_each = [-(-(before + n + slack) // case.block_size) for before, n, slack in case.sequences]
    width, count = max(blocks_each) + 1, sum(blocks_each) + 2
    order = torch.randperm(count - 1, generator=generator) + 1  # physical blocks, never block 0
    tables = torch.zeros(len(case.sequences), width, dtype=torch.int64)
    for i, (start, n) in enumerate(zip(itertools.accumulate(blocks_each, initial=0), blocks_each, strict=False)):
        tables[i, :n] = order[start : start + n]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)

    k_cache, v_cache = (normal(count * case.block_size, case.kv_heads, case.head_dim) for _ in range(2))
    owners = [(i, before + j) for i, (before, n, _) in enumerate(case.sequences) for j in range(n)]
    q = normal(len(owners), case.heads, case.head_dim)
    positions = torch.tensor([position for _, position in owners])
    slots = torch.stack([tables[i, p // case.block_size] * case.block_size + p % case.block_size for i, p in owners])
    meta = AttentionMetadata(
        positions, slots, tables, tuple(n for _, n, _ in case.sequences),
        tuple(before + n + slack for before, n, slack in case.sequences), case.block_size,
    )  # fmt: skip
    groups, scale = case.heads // case.kv_heads, 0.3
    actual = paged_attention(q, k_cache, v_cache, prepare(meta, groups=groups, dtype=case.dtype), scale)
    expected = torch.empty(q.shape, dtype=torch.float64)
    for token, (i, position) in enumerate(owners):
        rows = [
            int(tables[i, p // case.block_size]) * case.block_size + p % case.block_size for p in range(position + 1)
        ]
        for head in range(case.heads):
            keys, values = k_cache[rows, head // groups].double(), v_cache[rows, head // groups].double()
            expected[token, head] = torch.softmax(keys @ q[token, head].double() * scale, 0) @ values
    return actual, expected


def check(case: Case) -> None:
    actual, expected = run(case)
    rtol, atol = OP[case.dtype]
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
def test_mixes(mix: str, dtype: torch.dtype) -> None:
    check(Case(MIXES[mix], dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (5, 1)])
@pytest.mark.parametrize(("head_dim", "block_size"), [(6, 3), (16, 16), (2, 1)])
def test_shapes(heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    check(Case(MIXES["everything"], heads, kv_heads, head_dim, block_size))


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 2, 5, 16]),
    seed=st.integers(0, 1000),
)
def test_any_mix(sequences: list[tuple[int, int, int]], block_size: int, seed: int) -> None:
    check(Case(tuple(sequences), heads=2, kv_heads=1, head_dim=4, block_size=block_size, seed=seed))


def test_padding_tokens_are_finite_and_change_nobody() -> None:
    """A padding row has position 0, slot 0 and a table of zeros."""
    generator = torch.Generator().manual_seed(0)
    k_cache, v_cache = torch.randn(2, 12, 1, 4, generator=generator)
    q = torch.randn(4, 2, 4, generator=generator)
    positions = torch.tensor([5, 0, 0, 0])
    tables = torch.tensor([[2, 1], [0, 0], [0, 0]])

    def attend(sequences: int, lens: tuple[int, ...]) -> torch.Tensor:
        tokens = sum(lens)
        meta = AttentionMetadata(
            positions[:tokens],
            torch.zeros(tokens, dtype=torch.int64),
            tables[:sequences],
            lens,
            (6, 1, 1)[:sequences],
            4,
        )
        return paged_attention(q[:tokens], k_cache, v_cache, prepare(meta, groups=2, dtype=q.dtype), 0.5)

    padded = attend(3, (1, 1, 2))
    assert padded.isfinite().all()
    rtol, atol = OP[torch.float32]
    torch.testing.assert_close(padded[:1], attend(1, (1,)), rtol=rtol, atol=atol)


def test_a_bound_beyond_the_block_table_is_our_bug() -> None:
    meta = AttentionMetadata(torch.tensor([0]), torch.tensor([4]), torch.tensor([[1]]), (1,), (5,), 4)
    with pytest.raises(AssertionError, match="block table"):
        prepare(meta, groups=1, dtype=torch.float32)
