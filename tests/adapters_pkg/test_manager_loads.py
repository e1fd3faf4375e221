"""Copies into slots take their time: what is live when, and what may happen meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Make = Callable[..., Any]


@pytest.fixture
def manager(make: Make, write_adapter: Any, tmp_path: Path) -> Any:
    """Adapters a, b and c, and one slot."""
    manager = make(num_slots=1)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    return manager


def test_a_slot_is_live_when_its_load_ended(manager: Any) -> None:
    first, second = manager.ready("a"), manager.ready("a")
    assert manager.begin(first)
    assert manager.begin(second) == []  # they share the slot and the wait
    assert not manager.slots_live(first)
    assert not manager.slots_live(second)
    assert (manager.info("a").tier, manager.info("a").state, manager.info("a").slot) == ("host", "loading", None)
    assert manager.num_loading == 1
    manager.end_loads()
    assert manager.slots_live(first)
    assert manager.slots_live(second)
    assert manager.slots_live(())
    assert (manager.info("a").tier, manager.info("a").state, manager.info("a").slot) == ("device", None, 0)
    assert manager.num_loading == 0
    manager.finish(first)
    manager.finish(second)


def test_a_slot_is_taken_again_while_it_loads(manager: Any) -> None:
    """a, then b, then a again in one slot: only the last load makes it live."""
    a, b = manager.ready("a"), manager.ready("b")
    for uses in (a, b, a):
        assert manager.begin(uses)
        manager.release_slots(uses)
    assert manager.begin(a) == []  # it is warm, if not yet there
    for _ in range(3):
        assert not manager.slots_live(a)
        manager.end_loads(1)
    assert manager.slots_live(a)
    manager.finish(a)
    manager.finish(b, placed=False)


def test_an_adapter_is_unloaded_while_it_loads(manager: Any) -> None:
    a = manager.ready("a")
    version = manager.cache_key(a)[0][0]
    manager.begin(a)
    manager.unload("a")
    assert manager.host(version)  # its request still needs it
    manager.finish(a)
    with pytest.raises(AssertionError):
        manager.host(version)
    assert manager.stats().slots_used == 0
    b = manager.ready("b")
    manager.begin(b)
    manager.end_loads(1)  # a's, into a slot that stands for b
    assert not manager.slots_live(b)
    manager.end_loads(1)
    assert manager.slots_live(b)
    manager.finish(b)


def test_what_lies_warm_is_not_pushed_out_by_its_companion_in_a_sum(
    make: Make, write_adapter: Any, tmp_path: Path
) -> None:
    manager = make(num_slots=3)
    for seed, name in enumerate("abcd"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    for name in "abc":
        uses = manager.ready(name)
        manager.place(uses)
        manager.finish(uses)
    pair = manager.ready("a", "d")  # a was used longest ago; every order of the versions must keep it
    assert len(manager.place(pair)) == 1
    assert [manager.info(name).tier for name in "abcd"] == ["device", "host", "device", "device"]
    manager.finish(pair)
