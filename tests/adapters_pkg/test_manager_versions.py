"""Names and versions: reloads, changed folders, unloads, and what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specserve.core.errors import AdapterBusyError, AdapterError, NotFoundError
from specserve.core.messages import LoraRef
from specserve_adapters.adapter_files import hash_adapter

ONE = 2 * 2 * 32 * 4  # bytes of one rank-2 adapter of width 32 in float32
MakeManager = Callable[..., Any]


def test_reload_is_atomic(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.load_now("a", tmp_path / "a")
    old = manager.ready("a")
    manager.place(old)
    before = manager.cache_key(old)
    write_adapter(tmp_path / "a", 2)
    ticket = manager.load("a", tmp_path / "a", replace=True)
    during = manager.acquire((LoraRef("a"),))  # not visible before poll()
    assert manager.cache_key(during) == before
    assert ticket in manager.drain()
    assert ticket.error is None
    new = manager.ready("a")
    assert manager.cache_key(old) == manager.cache_key(during) == before != manager.cache_key(new)
    assert manager.place(new) == [(1, new[0].entry.version)]
    manager.release_slots(old)
    assert manager.place(old) == []  # preempted and back, on the version it began with
    old_version = old[0].entry.version
    manager.finish(old)
    assert manager.host(old_version)
    manager.finish(during, placed=False)
    with pytest.raises(AssertionError):  # nobody can reach it any more
        manager.host(old_version)
    manager.finish(new)
    assert manager.info("a").requests == 3


def test_same_contents_change_nothing(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.load_now("a", tmp_path / "a")
    entry = manager.ready("a")
    assert manager.load_now("a", tmp_path / "a").error is None
    assert manager.load_now("a", tmp_path / "a", replace=True).error is None
    again = manager.ready("a")
    assert again[0].entry is entry[0].entry
    manager.finish(entry, placed=False)
    manager.finish(again, placed=False)


def test_names_are_not_taken_over(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, seed)
    manager = make()
    manager.load_now("a", tmp_path / "a")
    version = manager.info("a").version
    for attempt in (manager.load, manager.register):
        with pytest.raises(AdapterError, match="exists already"):
            attempt("a", tmp_path / "b")
    write_adapter(tmp_path / "a", 3)
    error = manager.load_now("a", tmp_path / "a").error
    assert isinstance(error, AdapterError)
    assert "replace" in error.message
    assert manager.info("a").version == version
    assert manager.load_now("a", tmp_path / "b", replace=True).error is None
    assert manager.info("a").path == str(tmp_path / "b")
    first, second = manager.load("c", tmp_path / "a"), manager.load("c", tmp_path / "b")
    manager.drain()
    assert first.error is None
    assert isinstance(second.error, AdapterError)


def test_a_broken_reload_keeps_the_old(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.load_now("a", tmp_path / "a", pinned=True)
    info = manager.info("a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    error = manager.load_now("a", tmp_path / "a", replace=True).error
    assert isinstance(error, AdapterError)
    assert "'a'" in error.message
    assert "adapter_model.safetensors" in error.message
    assert manager.info("a") == info
    assert manager.load("new", tmp_path / "a")
    manager.drain()
    with pytest.raises(NotFoundError):
        manager.info("new")


def test_a_failed_read_fails_those_who_waited(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
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
    manager.drain()
    for uses in waiting:
        with pytest.raises(AdapterError, match="'a'"):
            manager.prepare(uses)
        manager.finish(uses, placed=False)
    assert manager.prepare(other)
    manager.finish(other, placed=False)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(weights)  # mended: the next request reads again
    manager.finish(manager.ready("a"), placed=False)


def test_unload_frees_when_requests_are_done(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.load_now("a", tmp_path / "a")
    running, waiting = manager.ready("a"), manager.ready("a")
    manager.place(running)
    version = running[0].entry.version
    manager.unload("a")
    with pytest.raises(NotFoundError, match="'a'"):
        manager.acquire((LoraRef("a"),))
    with pytest.raises(NotFoundError):
        manager.unload("a")
    manager.finish(running)
    assert manager.prepare(waiting)
    assert manager.place(waiting) == []
    manager.finish(waiting)
    with pytest.raises(AssertionError):
        manager.host(version)
    write_adapter(tmp_path / "a", 2)
    manager.load_now("a", tmp_path / "a")  # the name is free, and so is the slot
    fresh = manager.ready("a")
    assert manager.place(fresh) is not None
    manager.finish(fresh)


def test_unload_while_it_is_read(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    uses = manager.acquire((LoraRef("a"),))
    manager.prepare(uses)
    ticket = manager.load("a", tmp_path / "a")
    manager.unload("a")
    assert ticket in manager.drain()
    assert isinstance(ticket.error, AdapterBusyError)
    assert manager.list() == []
    assert manager.prepare(uses)  # its request still gets it
    manager.finish(uses, placed=False)


def test_a_changed_file_is_a_new_version_when_read_again(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(max_host_bytes=ONE)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    first = manager.ready("a")
    key = manager.cache_key(first)
    write_adapter(tmp_path / "a", 7)
    still = manager.ready("a")  # in host memory: no read
    assert manager.cache_key(still) == key
    manager.finish(first, placed=False)
    manager.finish(still, placed=False)
    manager.finish(manager.ready("b"), placed=False)  # evicts a
    again = manager.ready("a")
    assert manager.cache_key(again) == [(hash_adapter(tmp_path / "a", None), 1.0)] != key
    manager.finish(again, placed=False)


def test_a_pinned_reload_waits_for_users_of_the_old(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make(num_slots=1)
    manager.load_now("a", tmp_path / "a", pinned=True)
    waiting = manager.acquire((LoraRef("a"),))
    write_adapter(tmp_path / "a", 2)
    assert isinstance(manager.load_now("a", tmp_path / "a", replace=True).error, AdapterBusyError)
    manager.finish(waiting, placed=False)
    assert manager.load_now("a", tmp_path / "a", replace=True).error is None
    assert manager.info("a").pinned
