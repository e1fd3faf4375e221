"""Names, versions and tiers: what a request gets, when memory is freed, what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from specserve.core.errors import AdapterBusyError, AdapterError, InvalidRequestError, NotFoundError
from specserve.core.messages import LoraRef
from specserve_adapters.adapter_files import hash_adapter
from specserve_adapters.entry import AdapterUse
from specserve_adapters.manager import AdapterManager, LoadTicket
from specserve_adapters.reading import ReadQueue
from specserve_adapters.spec import LinearSpec
from specserve_adapters.store import StoredAdapter

ONE = 2 * 2 * 32 * 4  # bytes of one rank-2 adapter of width 32 in float32
Make = Callable[..., AdapterManager]
Uses = tuple[AdapterUse, ...]


@pytest.fixture
def make(specs: list[LinearSpec]) -> Iterator[Make]:
    made: list[AdapterManager] = []

    def build(**settings: Any) -> AdapterManager:
        defaults = {"num_slots": 2, "max_rank": 8, "max_host_bytes": 100 * ONE, "draft_specs": None}
        manager = AdapterManager(
            specs, **{**defaults, "dtype": torch.float32, "draft_dtype": torch.float32, **settings}
        )
        made.append(manager)
        return manager

    yield build
    for manager in made:
        manager.check_integrity()
        manager.close()


def drain(manager: AdapterManager) -> list[LoadTicket]:
    """All reads done, except one that waits for room."""
    tickets, left = manager.poll(), -1
    while manager.num_reading and manager.num_reading != left:
        left = manager.num_reading
        manager.wait(30)
        tickets += manager.poll()
        manager.check_integrity()
    return tickets


def ready(manager: AdapterManager, *names: str) -> Uses:
    uses = manager.acquire(tuple(LoraRef(name) for name in names))
    manager.prepare(uses)
    drain(manager)
    assert manager.prepare(uses)
    return uses


def place(manager: AdapterManager, uses: Uses) -> list[tuple[int, str]] | None:
    taken = manager.take_slots(uses)
    manager.check_integrity()
    return None if taken is None else [(load.slot, load.version) for load in taken[1]]


def finish(manager: AdapterManager, uses: Uses, *, placed: bool = True) -> None:
    if placed:
        manager.release_slots(uses)
    manager.release(uses)
    manager.check_integrity()


def load(manager: AdapterManager, name: str, path: Path, **settings: Any) -> LoadTicket:
    ticket = manager.load(name, path, **settings)
    assert ticket in drain(manager)
    assert ticket.done
    return ticket


def test_a_cold_adapter_is_read_on_demand(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    assert (manager.info("a").tier, manager.info("a").version) == ("disk", "")
    uses = manager.acquire((LoraRef("a", 0.5),))
    assert not manager.prepare(uses)
    drain(manager)
    assert manager.prepare(uses)
    version = hash_adapter(tmp_path / "a", None)
    assert manager.cache_key(uses) == [(version, 0.5)]
    assert manager.info("a").tier == "host"
    placement = manager.take_slots(uses)
    assert placement is not None
    assert placement[0] == ((0, 0.5),)
    assert [(item.slot, item.version) for item in placement[1]] == [(0, version)]
    assert manager.host(version)[0].num_bytes == ONE
    manager.count_tokens(uses, 5, 4, 3)
    info = manager.info("a")
    assert (info.tier, info.slot, info.running, info.requests) == ("device", 0, 1, 1)
    assert (info.rank, info.num_bytes, info.tokens, info.drafted, info.accepted) == (2, ONE, 5, 4, 3)
    finish(manager, uses)
    assert (manager.info("a").tier, manager.info("a").running) == ("device", 0)  # the slot stays warm
    warm = ready(manager, "a")
    assert place(manager, warm) == []
    finish(manager, warm)


def test_base_requests_need_nothing(make: Make) -> None:
    manager = make()
    uses = manager.acquire(())
    assert manager.prepare(uses)
    assert manager.take_slots(uses) == ((), [])
    assert manager.cache_key(uses) == []
    finish(manager, uses)


def test_sums_are_canonical(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=3)
    for name, seed in (("a", 1), ("b", 2), ("same", 1)):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    refs = [LoraRef("a", 0.1), LoraRef("b", 1.0), LoraRef("a", 0.2), LoraRef("same", -1.0)]
    uses, backwards = manager.acquire(tuple(refs)), manager.acquire(tuple(reversed(refs)))
    manager.prepare(uses)
    drain(manager)
    key = manager.cache_key(uses)
    assert key == manager.cache_key(backwards) == sorted(key)
    sums = dict(key)
    assert sums[hash_adapter(tmp_path / "b", None)] == 1.0
    # Equal contents are one adapter; scales are float32 values.
    assert sums[hash_adapter(tmp_path / "a", None)] == torch.tensor(0.1 + 0.2 - 1.0, dtype=torch.float32).item()
    finish(manager, uses, placed=False)
    finish(manager, backwards, placed=False)
    for scale in (1e39, -1e39):
        with pytest.raises(InvalidRequestError, match="scale"):
            manager.acquire((LoraRef("a", scale),))
    with pytest.raises(InvalidRequestError, match="scale"):
        manager.acquire((LoraRef("a", 3e38), LoraRef("a", 3e38)))


def test_more_adapters_than_slots(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2)
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    a, b, c = (ready(manager, name) for name in names)
    assert place(manager, a) == [(0, a[0].entry.version)]
    assert place(manager, b) == [(1, b[0].entry.version)]
    assert place(manager, c) is None  # both are used
    manager.release_slots(b)  # preempted: it may come back on its version
    assert place(manager, c) == [(1, c[0].entry.version)]
    assert place(manager, b) is None
    finish(manager, a)
    assert place(manager, b) == [(0, b[0].entry.version)]
    finish(manager, b)
    finish(manager, c)
    with pytest.raises(InvalidRequestError, match="3 adapters in one request"):
        manager.acquire(tuple(LoraRef(name) for name in names))


def test_take_slots_takes_all_or_nothing(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    a, pair = ready(manager, "a"), ready(manager, "b", "c")
    assert place(manager, a) is not None
    assert place(manager, pair) is None
    assert manager.info("b").slot is manager.info("c").slot is None
    finish(manager, a)
    loads = place(manager, pair)
    assert loads is not None
    assert sorted(slot for slot, _ in loads) == [0, 1]
    finish(manager, pair)


def test_reload_is_atomic(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    load(manager, "a", tmp_path / "a")
    old = ready(manager, "a")
    place(manager, old)
    before = manager.cache_key(old)
    write_adapter(tmp_path / "a", 2)
    ticket = manager.load("a", tmp_path / "a", replace=True)
    during = manager.acquire((LoraRef("a"),))  # not visible before poll()
    assert manager.cache_key(during) == before
    assert ticket in drain(manager)
    assert ticket.error is None
    new = ready(manager, "a")
    assert manager.cache_key(old) == manager.cache_key(during) == before != manager.cache_key(new)
    assert place(manager, new) == [(1, new[0].entry.version)]
    manager.release_slots(old)
    assert place(manager, old) == []  # preempted and back, on the version it began with
    old_version = old[0].entry.version
    finish(manager, old)
    assert manager.host(old_version)
    finish(manager, during, placed=False)
    with pytest.raises(AssertionError):  # nobody can reach it any more
        manager.host(old_version)
    finish(manager, new)
    assert manager.info("a").requests == 3


def test_same_contents_change_nothing(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    load(manager, "a", tmp_path / "a")
    entry = ready(manager, "a")
    assert load(manager, "a", tmp_path / "a").error is None
    assert load(manager, "a", tmp_path / "a", replace=True).error is None
    again = ready(manager, "a")
    assert again[0].entry is entry[0].entry
    finish(manager, entry, placed=False)
    finish(manager, again, placed=False)


def test_names_are_not_taken_over(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, seed)
    manager = make()
    load(manager, "a", tmp_path / "a")
    version = manager.info("a").version
    for attempt in (manager.load, manager.register):
        with pytest.raises(AdapterError, match="exists already"):
            attempt("a", tmp_path / "b")
    write_adapter(tmp_path / "a", 3)
    error = load(manager, "a", tmp_path / "a").error
    assert isinstance(error, AdapterError)
    assert "replace" in error.message
    assert manager.info("a").version == version
    assert load(manager, "a", tmp_path / "b", replace=True).error is None
    assert manager.info("a").path == str(tmp_path / "b")
    first, second = manager.load("c", tmp_path / "a"), manager.load("c", tmp_path / "b")
    drain(manager)
    assert first.error is None
    assert isinstance(second.error, AdapterError)


def test_a_broken_reload_keeps_the_old(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    load(manager, "a", tmp_path / "a", pinned=True)
    info = manager.info("a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    error = load(manager, "a", tmp_path / "a", replace=True).error
    assert isinstance(error, AdapterError)
    assert "'a'" in error.message
    assert "adapter_model.safetensors" in error.message
    assert manager.info("a") == info
    assert manager.load("new", tmp_path / "a")
    drain(manager)
    with pytest.raises(NotFoundError):
        manager.info("new")


def test_a_failed_read_fails_those_who_waited(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, seed)
    manager = make()
    manager.register("a", tmp_path / "a")
    manager.register("b", tmp_path / "b")
    weights = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights[:-4])
    waiting = [manager.acquire((LoraRef("a"),)) for _ in range(2)]
    other = manager.acquire((LoraRef("b"),))
    for uses in (*waiting, other):
        assert not manager.prepare(uses)
    drain(manager)
    for uses in waiting:
        with pytest.raises(AdapterError, match="'a'"):
            manager.prepare(uses)
        finish(manager, uses, placed=False)
    assert manager.prepare(other)
    finish(manager, other, placed=False)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)  # mended: the next request reads again
    finish(manager, ready(manager, "a"), placed=False)


def test_unload_frees_when_requests_are_done(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    load(manager, "a", tmp_path / "a")
    running, waiting = ready(manager, "a"), ready(manager, "a")
    place(manager, running)
    version = running[0].entry.version
    manager.unload("a")
    with pytest.raises(NotFoundError, match="'a'"):
        manager.acquire((LoraRef("a"),))
    with pytest.raises(NotFoundError):
        manager.unload("a")
    finish(manager, running)
    assert manager.prepare(waiting)
    assert place(manager, waiting) == []
    finish(manager, waiting)
    with pytest.raises(AssertionError):
        manager.host(version)
    write_adapter(tmp_path / "a", 2)
    load(manager, "a", tmp_path / "a")  # the name is free, and so is the slot
    fresh = ready(manager, "a")
    assert place(manager, fresh) is not None
    finish(manager, fresh)


def test_unload_while_it_is_read(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    uses = manager.acquire((LoraRef("a"),))
    manager.prepare(uses)
    ticket = manager.load("a", tmp_path / "a")
    manager.unload("a")
    assert ticket in drain(manager)
    assert isinstance(ticket.error, AdapterBusyError)
    assert manager.list() == []
    assert manager.prepare(uses)  # its request still gets it
    finish(manager, uses, placed=False)


def test_host_budget_evicts_the_least_recently_used(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=2 * ONE)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    for name in "abac":
        uses = ready(manager, name)
        place(manager, uses)
        finish(manager, uses)
    assert {info.name: info.tier for info in manager.list()} == {"a": "device", "b": "disk", "c": "device"}
    assert manager.info("b").version  # as last read


def test_a_changed_file_is_a_new_version_when_read_again(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=ONE)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    first = ready(manager, "a")
    key = manager.cache_key(first)
    write_adapter(tmp_path / "a", 7)
    still = ready(manager, "a")  # in host memory: no read
    assert manager.cache_key(still) == key
    finish(manager, first, placed=False)
    finish(manager, still, placed=False)
    finish(manager, ready(manager, "b"), placed=False)  # evicts a
    again = ready(manager, "a")
    assert manager.cache_key(again) == [(hash_adapter(tmp_path / "a", None), 1.0)] != key
    finish(manager, again, placed=False)


def test_too_large_for_ever_or_for_now(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=2 * ONE)
    for seed, (name, rank) in enumerate({"a": 2, "b": 4, "huge": 6}.items()):
        write_adapter(tmp_path / name, seed, rank=rank)
        manager.register(name, tmp_path / name)
    assert isinstance(load(manager, "huge", tmp_path / "huge").error, AdapterError)
    a = ready(manager, "a")
    b = manager.acquire((LoraRef("b"),))
    manager.prepare(b)
    drain(manager)
    assert not manager.prepare(b)  # it fits once a is done
    finish(manager, a, placed=False)
    drain(manager)
    assert manager.prepare(b)
    finish(manager, b, placed=False)
    manager.pin("b", True)
    assert isinstance(load(manager, "a", tmp_path / "a").error, AdapterError)  # beside a pinned one it never would


def test_requests_that_wait_for_each_other_go_on(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    """Each holds one adapter and waits for another, and the budget is full: it is exceeded rather than all stopped."""
    manager = make(max_host_bytes=2 * ONE)
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    finish(manager, ready(manager, "a"), placed=False)
    finish(manager, ready(manager, "c"), placed=False)
    first, second = (manager.acquire((LoraRef(x), LoraRef(y))) for x, y in ("ab", "cd"))
    for uses in (first, second):
        assert not manager.prepare(uses)
    drain(manager)
    assert [manager.prepare(uses) for uses in (first, second)] == [True, False]
    finish(manager, first, placed=False)
    drain(manager)
    assert manager.prepare(second)
    finish(manager, second, placed=False)
    assert sum(info.tier != "disk" for info in manager.list()) == 2


def test_pins(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2, max_host_bytes=2 * ONE)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    manager.pin("a", True)
    drain(manager)
    assert manager.info("a").tier == "host"
    for name in "abcb":
        uses = ready(manager, name)
        place(manager, uses)
        finish(manager, uses)
    assert (manager.info("a").tier, manager.info("a").slot) == ("device", 0)
    with pytest.raises(AdapterBusyError, match="pinned"):
        manager.unload("a")
    with pytest.raises(AdapterBusyError, match="pinned"):  # one slot is left
        manager.acquire((LoraRef("b"), LoraRef("c")))
    pair = manager.acquire((LoraRef("a"), LoraRef("b")))
    with pytest.raises(AdapterBusyError):  # that request would never run
        manager.pin("c", True)
    with pytest.raises(AdapterBusyError):
        manager.load("d", tmp_path / "c", pinned=True)
    finish(manager, pair, placed=False)
    manager.pin("c", True)
    with pytest.raises(AdapterBusyError):
        manager.pin("b", True)
    with pytest.raises(NotFoundError):
        manager.pin("nobody", True)
    for name in "ac":
        manager.pin(name, False)
        manager.unload(name)
    drain(manager)
    assert [info.name for info in manager.list()] == ["b"]


def test_a_pinned_reload_waits_for_those_who_need_the_old(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make(num_slots=1)
    load(manager, "a", tmp_path / "a", pinned=True)
    waiting = manager.acquire((LoraRef("a"),))
    write_adapter(tmp_path / "a", 2)
    assert isinstance(load(manager, "a", tmp_path / "a", replace=True).error, AdapterBusyError)
    finish(manager, waiting, placed=False)
    assert load(manager, "a", tmp_path / "a", replace=True).error is None
    assert manager.info("a").pinned


def test_companions(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    draft_specs = [LinearSpec(0, 16, (("self_attn.o_proj", 16),))]
    manager = make(draft_specs=draft_specs, draft_dtype=torch.float64)
    write_adapter(tmp_path / "a", 1)
    write_adapter(tmp_path / "a" / "draft", 1, width=16)
    write_adapter(tmp_path / "b", 2)
    write_adapter(tmp_path / "other", 3, rank=3, width=16)
    load(manager, "a", tmp_path / "a")
    load(manager, "b", tmp_path / "b")
    load(manager, "c", tmp_path / "b", draft_path=tmp_path / "other")
    infos = {info.name: info for info in manager.list()}
    assert {name: info.has_draft for name, info in infos.items()} == {"a": True, "b": False, "c": True}
    assert infos["c"].version == hash_adapter(tmp_path / "b", tmp_path / "other") != infos["b"].version
    assert infos["c"].rank == 3
    uses = ready(manager, "a")
    target, draft = manager.host(uses[0].entry.version)
    assert draft is not None
    assert infos["a"].num_bytes == target.num_bytes + draft.num_bytes == ONE + 2 * 2 * 16 * 8
    finish(manager, uses, placed=False)
    write_adapter(tmp_path / "a" / "draft", 1, width=32)
    error = load(manager, "a", tmp_path / "a", replace=True).error
    assert error is not None
    assert "draft companion: Tensor" in error.message
    with pytest.raises(AdapterError, match="not a folder"):
        manager.register("x", tmp_path / "b", tmp_path / "nowhere")
    assert load(make(), "a", tmp_path / "a").error is None  # without a draft model it is not looked at


def test_registering_looks_but_does_not_read(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    manager = make()
    with pytest.raises(AdapterError, match=r"'a': .*not a folder"):
        manager.register("a", tmp_path / "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match=r"'a': .*adapter_config.json"):
        manager.register("a", tmp_path / "a")
    write_adapter(tmp_path / "a", 1)
    (tmp_path / "a" / "adapter_config.json").write_text("not read yet")
    manager.register("a", tmp_path / "a")
    assert isinstance(manager.load("gone", tmp_path / "gone"), LoadTicket)
    (ticket,) = drain(manager)
    assert ticket.error is not None
    assert "'gone'" in ticket.error.message


def test_unknown_names_take_no_references(make: Make, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    with pytest.raises(NotFoundError, match="'b'"):
        manager.acquire((LoraRef("a"), LoraRef("b")))
    manager.check_integrity()
    assert manager.info("a").requests == 0


def test_an_unforeseen_failure_fails_its_own_read(caplog: pytest.LogCaptureFixture) -> None:
    def read(job: str) -> StoredAdapter:
        raise ZeroDivisionError(job)

    queue = ReadQueue(read)
    for job in ("first", "second"):
        queue.submit(job)
    for job in ("first", "second"):
        queue.wait(30)
        finished = queue.finished()
        assert finished is not None
        assert finished[0] == job
        assert isinstance(finished[1], AdapterError)
        assert f"ZeroDivisionError: {job}" in finished[1].message
        queue.pop()
    assert len(queue) == 0
    assert queue.finished() is None
    queue.close()
    assert len(caplog.records) == 2
