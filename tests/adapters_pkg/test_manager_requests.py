"""What a request gets: its adapters read, their slots, and the identity of its cached KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specserve.core.errors import AdapterError, InvalidRequestError, NotFoundError
from specserve.core.messages import LoraRef
from specserve_adapters.adapter_files import hash_adapter
from specserve_adapters.manager import LoadTicket
from specserve_adapters.spec import LinearSpec

ONE = 2 * 2 * 32 * 4  # bytes of one rank-2 adapter of width 32 in float32
MakeManager = Callable[..., Any]


def test_a_cold_adapter_is_read_on_demand(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    info = manager.info("a")
    assert (info.tier, info.version, info.rank, info.num_bytes, info.has_draft) == ("disk", "", None, None, None)
    uses = manager.acquire((LoraRef("a", 0.5),))
    assert not manager.prepare(uses)
    assert (manager.info("a").tier, manager.info("a").state) == ("disk", "reading")
    manager.drain()
    assert manager.info("a").state is None
    assert manager.prepare(uses)
    version = hash_adapter(tmp_path / "a", None)
    assert manager.cache_key(uses) == [(version, 0.5)]
    assert manager.info("a").tier == "host"
    placement = manager.take_slots(uses)
    assert placement is not None
    assert placement[0] == ((0, 0.5),)
    assert [(item.slot, item.version) for item in placement[1]] == [(0, version)]
    assert not manager.slots_live(uses)
    manager.loaded(placement[1][0])
    assert manager.slots_live(uses)
    assert manager.host(version)[0].num_bytes == ONE
    manager.count_tokens(uses, 5, 4, 3)
    info = manager.info("a")
    assert (info.tier, info.slot, info.running, info.requests) == ("device", 0, 1, 1)
    assert (info.rank, info.num_bytes, info.tokens, info.drafted, info.accepted) == (2, ONE, 5, 4, 3)
    manager.finish(uses)
    assert (manager.info("a").tier, manager.info("a").running) == ("device", 0)  # the slot stays warm
    warm = manager.ready("a")
    assert manager.place(warm) == []
    manager.finish(warm)


def test_base_requests_need_nothing(make: MakeManager) -> None:
    manager = make()
    uses = manager.acquire(())
    assert manager.prepare(uses)
    assert manager.take_slots(uses) == ((), [])
    assert manager.cache_key(uses) == []
    manager.finish(uses)


def test_sums_are_canonical(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=3)
    for name, seed in (("a", 1), ("b", 2), ("same", 1)):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    refs = [LoraRef("a", 0.1), LoraRef("b", 1.0), LoraRef("a", 0.2), LoraRef("same", -1.0)]
    uses, backwards = manager.acquire(tuple(refs)), manager.acquire(tuple(reversed(refs)))
    manager.prepare(uses)
    manager.drain()
    key = manager.cache_key(uses)
    assert key == manager.cache_key(backwards) == sorted(key)
    sums = dict(key)
    assert sums[hash_adapter(tmp_path / "b", None)] == 1.0
    # Equal contents are one adapter; scales are float32 values.
    assert sums[hash_adapter(tmp_path / "a", None)] == torch.tensor(0.1 + 0.2 - 1.0, dtype=torch.float32).item()
    manager.finish(uses, placed=False)
    manager.finish(backwards, placed=False)
    for scale in (1e39, -1e39):
        with pytest.raises(InvalidRequestError, match="scale"):
            manager.acquire((LoraRef("a", scale),))
    with pytest.raises(InvalidRequestError, match="scale"):
        manager.acquire((LoraRef("a", 3e38), LoraRef("a", 3e38)))


def test_more_adapters_than_slots(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2)
    names = ["a", "b", "c"]
    for seed, name in enumerate(names):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    a, b, c = (manager.ready(name) for name in names)
    assert manager.place(a) == [(0, a[0].entry.version)]
    assert manager.place(b) == [(1, b[0].entry.version)]
    assert manager.place(c) is None  # both are used
    manager.release_slots(b)  # preempted: it may come back on its version
    assert manager.place(c) == [(1, c[0].entry.version)]
    assert manager.place(b) is None
    manager.finish(a)
    assert manager.place(b) == [(0, b[0].entry.version)]
    manager.finish(b)
    manager.finish(c)
    with pytest.raises(InvalidRequestError, match="3 adapters in one request"):
        manager.acquire(tuple(LoraRef(name) for name in names))


def test_take_slots_takes_all_or_nothing(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    manager = make(num_slots=2)
    for seed, name in enumerate("abc"):
        write_adapter(tmp_path / name, seed)
        manager.register(name, tmp_path / name)
    a, pair = manager.ready("a"), manager.ready("b", "c")
    assert manager.place(a) is not None
    assert manager.place(pair) is None
    assert manager.info("b").slot is manager.info("c").slot is None
    manager.finish(a)
    loads = manager.place(pair)
    assert loads is not None
    assert sorted(slot for slot, _ in loads) == [0, 1]
    manager.finish(pair)


def test_registering_looks_but_does_not_read(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
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
    (ticket,) = manager.drain()
    assert ticket.error is not None
    assert "'gone'" in ticket.error.message


def test_unknown_names_take_no_references(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1)
    manager = make()
    manager.register("a", tmp_path / "a")
    with pytest.raises(NotFoundError, match="'b'"):
        manager.acquire((LoraRef("a"), LoraRef("b")))
    manager.check_integrity()
    assert manager.info("a").requests == 0


def test_companions(make: MakeManager, write_adapter: Any, tmp_path: Path) -> None:
    draft_specs = [LinearSpec(0, 16, (("self_attn.o_proj", 16),))]
    manager = make(draft_specs=draft_specs, draft_dtype=torch.float64)
    write_adapter(tmp_path / "a", 1)
    write_adapter(tmp_path / "a" / "draft", 1, width=16)
    write_adapter(tmp_path / "b", 2)
    write_adapter(tmp_path / "other", 3, rank=3, width=16)
    manager.load_now("a", tmp_path / "a")
    manager.load_now("b", tmp_path / "b")
    manager.load_now("c", tmp_path / "b", draft_path=tmp_path / "other")
    infos = {info.name: info for info in manager.list()}
    assert {name: info.has_draft for name, info in infos.items()} == {"a": True, "b": False, "c": True}
    assert infos["c"].version == hash_adapter(tmp_path / "b", tmp_path / "other") != infos["b"].version
    assert infos["c"].rank == 3
    uses = manager.ready("a")
    target, draft = manager.host(uses[0].entry.version)
    assert draft is not None
    assert infos["a"].num_bytes == target.num_bytes + draft.num_bytes == ONE + 2 * 2 * 16 * 8
    manager.finish(uses, placed=False)
    write_adapter(tmp_path / "a" / "draft", 1, width=32)
    error = manager.load_now("a", tmp_path / "a", replace=True).error
    assert error is not None
    assert "draft companion: Tensor" in error.message
    with pytest.raises(AdapterError, match="not a folder"):
        manager.register("x", tmp_path / "b", tmp_path / "nowhere")
    assert make().load_now("a", tmp_path / "a").error is None  # without a draft model it is not looked at
