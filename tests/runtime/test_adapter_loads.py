"""Loads beside the steps: in order, told of once they ended, their sources kept until then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from specserve.core.plan import AdapterLoad
from specserve.runtime import adapter_loads
from specserve.runtime.adapter_loads import AdapterLoads
from specserve_adapters.host_adapter import HostAdapter

CPU = torch.device("cpu")


class Pool:
    """Keeps what it was told to load, and not the adapters."""

    def __init__(self) -> None:
        self.loads: list[tuple[int, int | None]] = []

    def load_slot(self, slot: int, adapter: HostAdapter | None) -> None:
        self.loads.append((slot, None if adapter is None else adapter.rank))


class SlowStream:
    """A device whose work ends when it is told so."""

    marks: list[SlowStream.Mark]

    class Mark:
        def __init__(self) -> None:
            self.done = False

        def passed(self) -> bool:
            return self.done

    def __init__(self, device: torch.device) -> None:
        SlowStream.marks = []
        self.inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def mark(self) -> SlowStream.Mark:
        assert not self.inside
        self.marks.append(SlowStream.Mark())
        return self.marks[-1]


def adapter(rank: int) -> HostAdapter:
    return HostAdapter(torch.empty(0), {}, rank)


def test_both_pools_are_loaded_in_order() -> None:
    target, draft = Pool(), Pool()
    sources = {"x": (adapter(1), adapter(2)), "y": (adapter(3), None)}
    loads = AdapterLoads([target, draft], sources.__getitem__, CPU)  # type: ignore[list-item]
    wanted = [AdapterLoad(1, "x"), AdapterLoad(0, "y"), AdapterLoad(1, "y")]
    loads.begin(wanted[:2])
    loads.begin(wanted[2:])
    assert target.loads == [(1, 1), (0, 3), (1, 3)]
    assert draft.loads == [(1, 2), (0, None), (1, None)]
    assert loads.ended() == wanted  # on a CPU at once
    assert loads.ended() == []


def test_without_a_draft_companions_are_left() -> None:
    target = Pool()
    loads = AdapterLoads([target], lambda version: (adapter(1), adapter(2)), CPU)  # type: ignore[list-item]
    loads.begin([AdapterLoad(0, "x")])
    assert target.loads == [(0, 1)]


def test_sources_live_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loads, "SideStream", SlowStream)
    memory = {"x": (adapter(1), None), "y": (adapter(2), None)}
    kept = {version: weakref.ref(pair[0]) for version, pair in memory.items()}
    loads = AdapterLoads([Pool()], memory.__getitem__, CPU)  # type: ignore[list-item]
    first, second = AdapterLoad(0, "x"), AdapterLoad(0, "y")
    loads.begin([first, second])
    memory.clear()  # unloaded: the host tier has let go of them
    gc.collect()
    assert all(ref() is not None for ref in kept.values())
    assert loads.ended() == []
    SlowStream.marks[0].done = True
    assert loads.ended() == [first]
    assert (kept["x"]() is None, kept["y"]() is None) == (True, False)
    SlowStream.marks[1].done = True
    assert loads.ended() == [second]
    assert kept["y"]() is None
