"""The pool on a device: what a load leaves in the slots, as the grouped kernels read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specserve.layers import storage as storage_module
from specserve.layers.storage import DenseStorage
from specserve_adapters import pool as pool_module
from specserve_adapters.host_adapter import HostAdapter, head_bytes, num_modules, unpack, write_places
from specserve_adapters.pool import AdapterPool, AdapterWork
from specserve_adapters.spec import LinearSpec, ModuleKey
from specserve_kernels.lora import grouped as lora_grouped
from specserve_kernels.lora import load as lora_load
from specserve_kernels.lora.load import load_slot_ref, load_slot_triton

SPECS = [LinearSpec(0, 12, (("q", 8), ("k", 4), ("v", 5))), LinearSpec(0, 8, (("o", 12),))]
ALIGNED = [LinearSpec(0, 16, (("q", 144), ("k", 8))), LinearSpec(0, 8, (("o", 16),))]
RANK_BLOCK = 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapter(specs: list[LinearSpec], ranks: dict[str, int], dtype: torch.dtype, seed: int) -> HostAdapter:
    modules = [(spec, *named) for spec in specs for named in zip(spec.keys, spec.parts, strict=True)]
    sizes = [ranks.get(name, 0) * n for spec, _, (name, width) in modules for n in (spec.in_features, width)]
    count = num_modules(specs)
    payload = torch.zeros(head_bytes(count) + sum(sizes) * dtype.itemsize, dtype=torch.uint8)
    blob = unpack(payload, count, dtype)[1].copy_(randn(sum(sizes), seed=seed) * 0.3)
    flat = blob.split(sizes)
    made: dict[ModuleKey, tuple[Tensor, Tensor]] = {
        key: (a.view(ranks[name], spec.in_features), b.view(width, ranks[name]))
        for a, b, (spec, key, (name, width)) in zip(flat[::2], flat[1::2], modules, strict=True)
        if name in ranks
    }
    write_places(payload, specs, blob, made)
    return HostAdapter(blob, made, max(ranks.values()), payload)


@pytest.fixture
def triton_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools take the device's kernels wherever they run."""
    monkeypatch.setattr(pool_module, "backend", lambda *_: "triton")
    monkeypatch.setattr(pool_module, "load_slot", load_slot_triton)
    monkeypatch.setattr(lora_load, "_PROGRAMS", 2)  # Triton's interpreter takes them one after the other


def check_slot(pool: AdapterPool, slot: int, lora: HostAdapter) -> None:
    """Every module's A and Bᵀ, and zeros up to the adapter's rank rounded up."""
    stride = -(-pool.max_rank // RANK_BLOCK) * RANK_BLOCK
    padded = -(-lora.rank // RANK_BLOCK) * RANK_BLOCK
    assert pool.slot_ranks[slot] == lora.rank
    for spec, (a, b) in zip(pool.specs, pool.linears, strict=True):
        assert b.shape == (pool.num_slots * stride, spec.out_features)
        column = 0
        for part, (key, (_, width)) in enumerate(zip(spec.keys, spec.parts, strict=True)):
            want_a, want_b = torch.zeros(padded, spec.in_features), torch.zeros(padded, width)
            if key in lora.factors:
                a_part, b_part = lora.factors[key]
                want_a[: len(a_part)], want_b[: len(a_part)] = a_part.float(), b_part.t().float()
            first = (slot * len(spec.parts) + part) * stride
            assert torch.equal(a[first : first + padded].float().cpu(), want_a)
            rows = b[slot * stride : slot * stride + padded, column : column + width]
            assert torch.equal(rows.float().cpu(), want_b)
            column += width


@pytest.mark.usefixtures("triton_pool")
@pytest.mark.parametrize("specs", [SPECS, ALIGNED], ids=["odd", "aligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots(specs: list[LinearSpec], dtype: torch.dtype, device: torch.device) -> None:
    """Modules without LoRA and of smaller rank, slots used before; neighbours stay as they are."""
    pool = AdapterPool(specs, 3, 20, dtype, device)
    assert pool._align == (8 if specs is ALIGNED else 1)
    full = adapter(specs, {"q": 20, "k": 20, "v": 20, "o": 20}, dtype, 0)
    part, other = adapter(specs, {"q": 2, "v": 4}, dtype, 2), adapter(specs, {"o": 8, "k": 16}, dtype, 4)
    held: dict[int, HostAdapter] = {}
    for slot, lora in ((0, full), (2, full), (0, part), (1, full), (2, other), (0, full)):
        pool.load_slot(slot, lora)
        held[slot] = lora
        for index, there in held.items():
            check_slot(pool, index, there)
    pool.clear_slot(0)
    assert pool.slot_ranks.tolist() == [0, 20, 16]
    with pytest.raises(AssertionError, match="device_batch"):
        pool.make_batch([()], [1])


@pytest.mark.usefixtures("triton_pool")
def test_slots_feed_the_products(device: torch.device) -> None:
    """What lies in the slots, multiplied, against loops over tokens and modules; a slot loaded anew is seen."""
    pool = AdapterPool(SPECS, 3, 5, torch.float32, device)
    full = adapter(SPECS, {"q": 5, "k": 5, "v": 5, "o": 5}, torch.float32, 0)
    part, other = adapter(SPECS, {"q": 2, "v": 4}, torch.float32, 2), adapter(SPECS, {"o": 1, "k": 3}, torch.float32, 4)
    token_rows = torch.tensor([1, 0, 1, 2], device=device)
    row_slots = torch.tensor([[0, -1], [2, 0], [-1, -1]], device=device)
    row_weights = torch.tensor([[1.0, 0.0], [0.5, -2.0], [3.0, 3.0]], device=device)
    for first, second in ((full, full), (part, other), (full, part)):
        pool.load_slot(0, first)
        pool.load_slot(2, second)
        both = [(second, 0.5), (first, -2.0)]
        batch = pool.device_batch(token_rows, row_slots, row_weights)
        for index, spec in enumerate(SPECS):
            x, y = randn(4, spec.in_features).to(device), randn(4, spec.out_features, seed=1).to(device)
            want = by_hand(index, x, y, [both, [(first, 1.0)], both, []])
            batch.update(index, x).add_to(y)
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("triton_pool")
@pytest.mark.parametrize("bias", [False, True])
def test_slots_behind_the_weights_come_with_the_product(
    bias: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is loaded into its linears' own memory, where there is room for all, and the product reads it there."""
    monkeypatch.setattr(storage_module, "runs_triton", lambda _: True)
    monkeypatch.setattr(storage_module, "MOST_BEHIND", 10)
    monkeypatch.setattr(lora_grouped, "FEWEST_SPLIT", 1)
    dtype, slots = torch.float32, 3
    rows = [slots * len(spec.parts) * RANK_BLOCK for spec in SPECS]
    storages = [
        DenseStorage(spec.in_features, [width for _, width in spec.parts], bias=bias, dtype=dtype, device=device,
                     adapter_rows=count)
        for spec, count in zip(SPECS, rows, strict=True)
    ]  # fmt: skip
    pool = AdapterPool(SPECS, slots, 5, dtype, device, [storage.behind for storage in storages])
    full, part = (adapter(SPECS, {"q": rank, "k": 3, "o": rank}, dtype, rank) for rank in (5, 2))
    pool.load_slot(0, full)
    pool.load_slot(2, part)
    check_slot(pool, 0, full)
    check_slot(pool, 2, part)
    token_rows = torch.tensor([1, 0, 1], device=device)
    row_slots, row_weights = torch.tensor([[0], [2]], device=device), torch.tensor([[1.5], [0.5]], device=device)
    batch = pool.device_batch(token_rows, row_slots, row_weights)
    for index, (spec, storage) in enumerate(zip(SPECS, storages, strict=True)):
        for number, parameters in enumerate(storage.parameters()):
            for seed, parameter in enumerate(parameters.values()):
                parameter.load(randn(*parameter.shape, seed=10 * number + seed))
        x = randn(3, spec.in_features).to(device)
        both = storage.matmul_behind(x, batch, index)
        assert both is not None
        plain = storage.matmul(x)
        torch.testing.assert_close(both[0], plain, rtol=1e-5, atol=1e-5)
        y = torch.zeros_like(plain)
        both[1].add_to(y, both[0])
        want = by_hand(index, x, plain, [[(part, 0.5)], [(full, 1.5)], [(part, 0.5)]])
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("triton_pool")
def test_memory_for_other_slots_is_not_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage has room for three slots; the pool has two, in memory of its own, and the product leaves them alone."""
    monkeypatch.setattr(storage_module, "runs_triton", lambda _: True)
    monkeypatch.setattr(storage_module, "MOST_BEHIND", 10)
    monkeypatch.setattr(lora_grouped, "FEWEST_SPLIT", 1)
    storage = DenseStorage(8, (12,), bias=False, dtype=torch.float32, device=device, adapter_rows=3 * RANK_BLOCK)
    pool = AdapterPool(SPECS[1:], 2, 5, torch.float32, device, [storage.behind])
    one = torch.zeros(1, dtype=torch.int64, device=device)
    batch = pool.device_batch(one, one[:, None], torch.ones(1, 1, device=device))
    assert storage.behind is not None and storage.matmul_behind(randn(1, 8).to(device), batch, 0) is None


def by_hand(index: int, x: Tensor, y: Tensor, rows: list[list[tuple[HostAdapter, float]]]) -> Tensor:
    out = y.double().cpu()
    for token, row in enumerate(rows):
        for lora, weight in row:
            column = 0
            for key, (_, width) in zip(SPECS[index].keys, SPECS[index].parts, strict=True):
                if key in lora.factors:
                    a, b = (factor.double() for factor in lora.factors[key])
                    out[token, column : column + width] += weight * (b @ (a @ x[token].double().cpu()))
                column += width
    return out.to(y)


@pytest.mark.usefixtures("triton_pool")
def test_no_slots(device: torch.device) -> None:
    assert AdapterPool(SPECS, 0, 16, torch.float32, device).slot_ranks.shape == (0,)


@pytest.mark.parametrize("align", [1, 8])
def test_loading(align: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel and its reference over what lay there before: ranks from 0 to the slot's, several blocks a program."""
    monkeypatch.setattr(lora_load, "_PROGRAMS", 2)
    blob = randn(30_000).to(device)
    n = align
    places = [[0, 400 * n, 3], [9, 9, 0], [1000 * n, 1200 * n, 16]]
    layout = [
        [8 * n, 9000, 2000 * n, 5000, 30 * n, 33 * n, 40 * n],
        [600 * n, 9000 + 33 * n, 2000 * n, 5000, 30 * n, 7 * n, 40 * n],
        [1200 * n, 20_000, 2000 * n, 5000, 9 * n, 12 * n, 12 * n],
    ]
    places, layout = (torch.tensor(rows, device=device) for rows in (places, layout))
    stores = [randn(60_000, seed=1).to(device) for _ in range(2)]
    load_slot_triton(stores[0], blob, places, layout, 1, 16, align)
    load_slot_ref(stores[1], blob, places, layout, 1, 16)
    assert torch.equal(*stores)


def test_loading_does_not_wait(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    pool = AdapterPool(SPECS, 3, 5, torch.float32, device)
    lora = adapter(SPECS, {"q": 5, "o": 2}, torch.float32, 0)
    pinned = HostAdapter(lora.blob, lora.factors, lora.rank, lora.payload.pin_memory())
    pool.load_slot(1, pinned)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pool.load_slot(0, pinned)
        pool.clear_slot(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_slot(pool, 0, lora)
    assert pool.slot_ranks.tolist() == [5, 0, 0]


def test_how_much_the_adapters_of_a_batch_are() -> None:
    """Counted by the ranks of the slots named, each once; slots that are empty are no work. Among many tokens, only
    those of rows that share tiles count."""
    pool = AdapterPool(SPECS, 4, 272, torch.float32, "cpu")
    for slot, rank in ((0, 272), (1, 256), (2, 3)):
        pool.load_slot(slot, adapter(SPECS, {"q": rank}, torch.float32, slot))
    first, second, third, empty = (((slot, 1.0),) for slot in range(4))

    def work(*rows: tuple[tuple[int, float], ...], lens: tuple[int, ...] = ()) -> AdapterWork:
        return pool.work(rows, lens or (1,) * len(rows))

    assert work((), empty) is work() is work(empty, lens=(900,)) is AdapterWork.NONE
    assert work(third, second[:0], empty) is AdapterWork.SOME
    assert work(second, second) is AdapterWork.SOME
    assert work(second, third) is work(first) is AdapterWork.MANY
    assert work(first, second, lens=(100, 64)) is work(first, third, lens=(128, 1)) is AdapterWork.SOME
    assert work(third, second, lens=(128, 63)) is work(*[second] * 129) is AdapterWork.MANY
    padded = {tokens: pool.work([second], (1,), tokens) for tokens in (1, 128, 256)}
    assert padded == {1: AdapterWork.SOME, 128: AdapterWork.SOME, 256: AdapterWork.MANY}


@pytest.mark.usefixtures("triton_pool")
def test_pretended_adapters_take_work_and_change_nothing(device: torch.device) -> None:
    pool = AdapterPool(SPECS, 3, 32, torch.float32, device)
    rows = [((slot, 1.0),) for slot in range(3)]
    assert pool.can_pretend and pool.work(rows, (1, 1, 1)) is AdapterWork.NONE
    pool.pretend(2, 16)
    assert pool.slot_ranks.tolist() == [16, 16, 0] and pool.work(rows, (1, 1, 1)) is AdapterWork.SOME
    assert all(not a.any() and not b.any() for a, b in pool.linears)
    pool.pretend(2, 0)
    assert pool.slot_ranks.tolist() == [0, 0, 0] and pool.can_pretend
    pool.load_slot(1, adapter(SPECS, {"q": 4}, torch.float32, seed=1))
    assert not pool.can_pretend
