"""Room: the host tier's budget, device slots, pins."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specserve.core.errors import AdapterBusyError, AdapterError, NotFoundError
from specserve.core.messages import LoraRef

ONE = 2 * 2 * 32 * 4  # bytes of one rank-2 adapter of width 32 in float32
MakeManager = Callable[..., Any]


def test_host_budget_evicts_the_least_recently_used(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=2 * ONE)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    for name in "abac":
        uses = manager.ready(name)
        manager.place(uses)
        manager.finish(uses)
    assert {info.name: info.tier for info in manager.list()} == {"a": "device", "b": "disk", "c": "device"}
    assert manager.info("b").version  # as last read


def test_too_large_for_ever_or_for_now(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=2 * ONE)
    for seed, (name, rank) in enumerate({"a": 2, "b": 4, "huge": 6}.items()):
        write_adapter(tmp_path / name, seed, rank=rank)
        manager.register(name, tmp_path / name)
    assert isinstance(manager.load_now("huge", tmp_path / "huge").error, AdapterError)
    a = manager.ready("a")
    b = manager.acquire((LoraRef("b"),))
    manager.prepare(b)
    manager.drain()
    assert not manager.prepare(b)  # it fits once a is done
    manager.finish(a, placed=False)
    manager.drain()
    assert manager.prepare(b)
    manager.finish(b, placed=False)
    manager.pin("b", True)
    assert isinstance(manager.load_now("a", tmp_path / "a").error, AdapterError)  # beside a pinned one it never would


def test_requests_that_wait_for_each_other_go_on(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    """Each holds one adapter and waits for another, and the budget is full: it is exceeded rather than all stopped."""
    manager = make(max_host_bytes=2 * ONE)
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    manager.finish(manager.ready("a"), placed=False)
    manager.finish(manager.ready("c"), placed=False)
    first, second = (manager.acquire((LoraRef(x), LoraRef(y))) for x, y in ("ab", "cd"))
    for uses in (first, second):
        assert not manager.prepare(uses)
    manager.drain()
    assert [manager.prepare(uses) for uses in (first, second)] == [True, False]
    manager.finish(first, placed=False)
    manager.drain()
    assert manager.prepare(second)
    manager.finish(second, placed=False)
    assert sum(info.tier != "disk" for info in manager.list()) == 2


def test_pins(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2, max_host_bytes=2 * ONE)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    manager.pin("a", True)
    manager.drain()
    assert manager.info("a").tier == "host"
    for name in "abcb":
        uses = manager.ready(name)
        manager.place(uses)
        manager.finish(uses)
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
    manager.finish(pair, placed=False)
    manager.pin("c", True)
    with pytest.raises(AdapterBusyError):
        manager.pin("b", True)
    with pytest.raises(NotFoundError):
        manager.pin("nobody", True)
    for name in "ac":
        manager.pin(name, False)
        manager.unload(name)
    manager.drain()
    assert [info.name for info in manager.list()] == ["b"]


def test_what_changed_is_told_once(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=1)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name, weight=seed + 1)

    def changed() -> tuple[dict[str, str], list[str]]:
        infos, gone = manager.changed()
        assert infos == [manager.info(info.name) for info in infos]
        return {info.name: info.tier for info in infos}, gone

    assert changed() == ({"a": "disk", "b": "disk", "c": "disk"}, [])
    assert changed() == ({}, [])
    a = manager.ready("a")
    assert changed() == ({"a": "host"}, [])
    manager.begin(a)
    assert changed() == ({"a": "host"}, [])  # its slot does not hold it yet
    manager.end_loads()
    assert changed() == ({"a": "device"}, [])
    manager.count_tokens(a, 3, 0, 0)
    assert changed() == ({"a": "device"}, [])
    manager.finish(a)
    b = manager.ready("b")
    manager.place(b)
    assert changed() == ({"a": "host", "b": "device"}, [])  # it took the slot
    manager.unload("b")
    assert changed() == ({}, ["b"])
    manager.finish(b)
    assert changed() == ({}, [])
    manager.unload("c")
    manager.register("c", tmp_path / "c")
    assert changed() == ({"c": "disk"}, [])
    assert manager.weight_of(a) == 1
    assert manager.weight_of(()) == 1


def test_tier_stats(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2, max_host_bytes=3 * ONE)
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    for name in "abcda":
        uses = manager.ready(name)
        manager.place(uses)
        manager.finish(uses)
    stats = manager.stats()
    assert (stats.host_bytes, stats.max_host_bytes, stats.slots, stats.slots_used) == (3 * ONE, 3 * ONE, 2, 2)
    assert (stats.reads, stats.loads, stats.evictions_host, stats.evictions_device) == (5, 5, 2, 3)
    assert stats.read_seconds > 0 < stats.load_seconds


def test_a_thousand_names_cost_a_step_nothing(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    """What the engine calls at every step and request looks at no other name."""
    write_adapter(tmp_path / "a", 1)
    manager = make()
    for index in range(1000):
        manager.register(f"a{index}", tmp_path / "a")
    manager.changed()
    names = manager._names
    names.__class__ = type("Watched", (type(names),), {"__iter__": _nobody_looks})
    uses = manager.acquire((LoraRef("a7"),))
    manager.prepare(uses)
    while manager.wait(30):
        manager.poll()
    manager.take_slots(uses)
    assert [info.name for info in manager.changed()[0]] == ["a7"]
    manager.count_tokens(uses, 1, 0, 0)
    manager.release_slots(uses)
    manager.release(uses)
    manager.unload("a7")
    manager.changed()
    manager.stats()
    names.__class__ = type(names).__mro__[1]


def _nobody_looks(names: object) -> None:
    raise AssertionError("a loop over all names")


def test_a_pin_that_takes_the_last_slot_is_told(
    make: MakeManager, write_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By a pin or by a load that pins; once, and not again by what changes nothing."""
    caplog.set_level(logging.WARNING, "specserve_adapters")
    manager = make(num_slots=2)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)

    def told() -> list[str]:
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    manager.pin("a", True)
    assert told() == []
    manager.pin("b", True)
    (message,) = told()
    assert message.startswith("2 of 2 device slots are pinned, the last one for adapter 'b': ")
    assert "specserve adapters unpin" in message
    assert "--max-loras" in message
    with pytest.raises(AdapterBusyError):  # as the message says
        manager.acquire((LoraRef("c"),))
    manager.pin("b", True)
    assert manager.load_now("b", tmp_path / "b", replace=True, pinned=True).error is None
    with pytest.raises(AdapterBusyError):
        manager.pin("c", True)
    assert told() == []
    manager.pin("a", False)
    assert told() == []
    assert manager.load_now("c", tmp_path / "c", pinned=True).error is None
    (message,) = told()
    assert message.startswith("2 of 2 device slots are pinned, the last one for adapter 'c': ")
