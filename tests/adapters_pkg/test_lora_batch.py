"""The batched product against a loop over tokens, adapters and modules."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.pool import AdapterPool
from specserve_adapters.spec import LinearSpec, ModuleKey
from specserve_kernels.lora.batch import lora, lora_ref
from specserve_kernels.tolerances import OP

SLOTS, MAX_RANK = 3, 5
SPECS = [
    LinearSpec(0, 12, (("q", 8), ("k", 4), ("v", 4))),
    LinearSpec(0, 8, (("o", 12),)),
    LinearSpec(1, 12, (("gate", 6), ("up", 6))),
    LinearSpec(1, 12, (("q", 8), ("k", 4), ("v", 4))),
]
Rows = list[tuple[tuple[int, float], ...]]


def random_adapter(seed: int, dtype: torch.dtype) -> HostAdapter:
    """Random ranks and a random part of the modules, at least one."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    modules = [(spec, key, width) for spec in SPECS for key, (_, width) in zip(spec.keys, spec.parts, strict=True)]
    factors: dict[ModuleKey, tuple[Tensor, Tensor]] = {}
    for spec, key, width in rng.sample(modules, rng.randint(1, len(modules))):
        rank = rng.randint(1, MAX_RANK)
        a = torch.randn(rank, spec.in_features, generator=generator, dtype=torch.float64) * 0.3
        b = torch.randn(width, rank, generator=generator, dtype=torch.float64) * 0.3
        factors[key] = (a.to(dtype), b.to(dtype))
    return HostAdapter(torch.empty(0), factors, max(a.shape[0] for a, _ in factors.values()))


def by_hand(
    index: int, x: Tensor, y: Tensor, slots: list[HostAdapter | None], rows: Rows, query_lens: list[int]
) -> Tensor:
    """One token, one adapter, one module at a time, in float64."""
    out = y.double().clone()
    tokens = [row for row, length in zip(rows, query_lens, strict=True) for _ in range(length)]
    for token, row in enumerate(tokens):
        for slot, weight in row:
            adapter, column = slots[slot], 0
            for key, (_, width) in zip(SPECS[index].keys, SPECS[index].parts, strict=True):
                if adapter is not None and key in adapter.factors:
                    a, b = (factor.double() for factor in adapter.factors[key])
                    out[token, column : column + width] += weight * (b @ (a @ x[token].double()))
                column += width
    return out


def check(pool: AdapterPool, slots: list[HostAdapter | None], rows: Rows, query_lens: list[int]) -> None:
    dtype = pool.linears[0][0].dtype
    batch = pool.make_batch(rows, query_lens)
    if not any(slots[slot] is not None for row in rows for slot, _ in row):
        assert batch is None
        return
    assert batch is not None
    for index, spec in enumerate(SPECS):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(sum(query_lens), spec.in_features, generator=generator).to(dtype)
        y = torch.randn(sum(query_lens), spec.out_features, generator=generator).to(dtype)
        want = by_hand(index, x, y, slots, rows, query_lens)
        for _ in range(2):  # the second time with what the first has gathered
            got = y.clone()
            batch.apply(index, x, got)
            rtol, atol = OP[dtype]
            torch.testing.assert_close(got, want.to(dtype), rtol=rtol, atol=atol)


weights = st.sampled_from([0.0, 1.0, 0.5, -2.0, 0.1])
mixes = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(0, SLOTS - 1), weights), max_size=4).map(tuple), st.integers(1, 4)),
    min_size=1,
    max_size=5,
)
loads = st.lists(st.none() | st.integers(0, 1000), min_size=SLOTS, max_size=SLOTS)


@settings(max_examples=40, deadline=None)
@given(loads, loads, mixes)
def test_mixed_batches(first: list[int | None], second: list[int | None], mix: list[tuple[tuple, int]]) -> None:
    """Base rows, sums, scales, a slot twice in a row, empty slots, real ranks; slots overwritten in between."""
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float64, "cpu")
    rows, query_lens = [row for row, _ in mix], [length for _, length in mix]
    for seeds in (first, second):
        adapters = [None if seed is None else random_adapter(seed, torch.float64) for seed in seeds]
        for slot, adapter in enumerate(adapters):
            pool.load_slot(slot, adapter)
        check(pool, adapters, rows, query_lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, dtype, "cpu")
    adapters: list[HostAdapter | None] = [random_adapter(seed, dtype) for seed in range(SLOTS)]
    for slot, adapter in enumerate(adapters):
        pool.load_slot(slot, adapter)
    check(pool, adapters, [((0, 1.0), (2, 0.3)), (), ((1, -0.7),)], [3, 2, 1])


def test_only_real_ranks_of_active_slots_are_read() -> None:
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float32, "cpu")
    adapters = [random_adapter(seed, torch.float32) for seed in range(SLOTS)]
    for slot, adapter in enumerate(adapters):
        pool.load_slot(slot, adapter)
    batch = pool.make_batch([((2, 1.0),), ()], [1, 1])
    assert batch is not None
    rank = adapters[2].rank
    assert {parts: len(rows) for parts, rows in batch.rows.items()} == {1: rank, 2: 2 * rank, 3: 3 * rank}
    assert batch.rows[3].tolist() == [(2 * 3 + part) * MAX_RANK + row for part in range(3) for row in range(rank)]
    assert all(batch.weights[parts].shape == (2, parts * rank) for parts in (1, 2, 3))


def test_slots_are_overwritten_whole() -> None:
    used, fresh = (AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float64, "cpu") for _ in range(2))
    for seed in range(20):
        used.load_slot(1, random_adapter(seed, torch.float64))
    fresh.load_slot(1, random_adapter(20, torch.float64))
    used.load_slot(1, random_adapter(20, torch.float64))
    for (a, b), (fresh_a, fresh_b) in zip(used.linears, fresh.linears, strict=True):
        assert torch.equal(a, fresh_a)
        assert torch.equal(b, fresh_b)
    used.clear_slot(1)
    assert all(not tensor.any() for pair in used.linears for tensor in pair)
    assert used.make_batch([((1, 1.0),)], [1]) is None


def test_gathering_once_or_at_every_use_is_the_same() -> None:
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float32, "cpu")
    for slot in range(SLOTS):
        pool.load_slot(slot, random_adapter(slot, torch.float32))
    kept = pool.make_batch([((0, 1.0), (1, 0.5)), ()], [2, 1])
    assert kept is not None
    fresh = dataclasses.replace(kept, factors=None)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        y, z = torch.ones(3, 16), torch.ones(3, 16)
        kept.apply(0, x, y)
        fresh.apply(0, x, z)
        assert torch.equal(y, z)
        assert torch.equal(y[2], torch.ones(16))
        assert not torch.equal(y[:2], torch.ones(2, 16))


def test_batches_are_kept_until_a_slot_changes() -> None:
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float32, "cpu")
    pool.load_slot(0, random_adapter(0, torch.float32))
    rows: Rows = [((0, 1.0),), ()]
    first, other = pool.make_batch(rows, [1, 1]), pool.make_batch(rows, (2, 1))
    assert first is not None
    assert other is not None
    assert pool.make_batch(rows, (1, 1)) is first
    assert first.factors is other.factors
    first.apply(0, torch.ones(2, 12), torch.zeros(2, 16))
    for length in range(50):  # bounded
        pool.make_batch(rows, [1, length + 1])
    assert len(pool._batches) <= 8
    assert pool.make_batch(rows, [1, 1]) is not first
    pool.load_slot(0, random_adapter(1, torch.float32))
    check(pool, [random_adapter(1, torch.float32), None, None], rows, [1, 1])


def test_an_overflow_stays_in_its_own_row() -> None:
    """An adapter whose product with another row's activations exceeds float16 must not reach that row."""
    pool = AdapterPool(SPECS, SLOTS, MAX_RANK, torch.float16, "cpu")
    huge = HostAdapter(torch.empty(0), {(0, "o", None): (torch.full((1, 8), 6e4), torch.ones(12, 1))}, 1)
    pool.load_slot(0, huge)
    batch = pool.make_batch([((0, 1.0),), ()], [1, 1])
    assert batch is not None
    y = torch.ones(2, 12, dtype=torch.float16)
    batch.apply(1, torch.full((2, 8), 1e3, dtype=torch.float16), y)
    assert torch.equal(y[1], torch.ones(12, dtype=torch.float16))
    assert y[0].isinf().all()


def test_public_op_checks_and_agrees() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(shape, generator=generator) for shape in ((3, 4), (3, 6), (8, 4), (8, 6)))
    rows, scale = torch.tensor([5, 1]), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.5, 2.0]])
    want = y + (x @ a[rows].T * scale) @ b[rows]
    got = lora(x, y.clone(), a, b, rows, scale)
    torch.testing.assert_close(got, want)
    assert torch.equal(got, lora_ref(x, y.clone(), a, b, rows, scale))
    assert torch.equal(got[1], y[1])
    for bad, said in (
        ((x[0], y, a, b, rows, scale), "dimensions"),
        ((x, y[:2], a, b, rows, scale), "shapes"),
        ((x, y, a[:, :3], b, rows, scale), "shapes"),
        ((x, y, a, b, rows, scale[:, :1]), "shapes"),
        ((x.double(), y, a, b, rows, scale), "one dtype"),
        ((x, y, a, b, rows.int(), scale), "int64"),
        ((x, y, a, b, rows, scale.double()), "weights"),
    ):
        with pytest.raises(ValueError, match=said):
            lora(*bad)
