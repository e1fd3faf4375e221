"""Adapters that take their time: into a slot, as on a device, though a CPU copies them at once; and from a disk that is
slow now and then."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence

from specserve.core.plan import AdapterLoad
from specserve.llm import LLM
from specserve_adapters.entry import Read
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.store import StoredAdapter


class LateLoads:
    """In place of AdapterLoads: a load is done when it is told of, with a chance of a half at each step; until then its
    slot holds what it held before."""

    def __init__(self, llm: LLM, rng: random.Random) -> None:
        self._runner, self._host = llm.engine.built.runner, llm.engine.adapters.host
        self._rng = random.Random(rng.random())
        self._waiting: deque[tuple[AdapterLoad, tuple[HostAdapter, HostAdapter | None]]] = deque()

    def begin(self, loads: Sequence[AdapterLoad]) -> None:
        self._waiting.extend((load, self._host(load.version)) for load in loads)

    def ended(self) -> list[AdapterLoad]:
        ended = []
        while self._waiting and self._rng.random() < 0.5:
            load, sources = self._waiting.popleft()
            for state, adapter in zip(self._runner.states, sources, strict=False):
                state.adapters.load_slot(load.slot, adapter)
            ended.append(load)
        return ended


def delay_loads(llm: LLM, rng: random.Random) -> None:
    """From now on this engine's loads take their time."""
    llm.engine.built.runner._loads = LateLoads(llm, rng)


def delay_reads(llm: LLM, rng: random.Random) -> None:
    """From now on some of this engine's reads end long after others that began with them."""
    queue = llm.engine.adapters._intake.queue
    read, rng = queue._read, random.Random(rng.random())

    def read_late(job: Read) -> StoredAdapter:
        time.sleep(rng.choice((0.0, 0.0, 0.0, 0.002, 0.01)))
        stored = read(job)
        time.sleep(rng.choice((0.0, 0.0, 0.0, 0.002, 0.01)))
        return stored

    queue._read = read_late
