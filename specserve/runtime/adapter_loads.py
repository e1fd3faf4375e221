"""Adapters on their way from host memory into device slots, beside the steps and unnoticed by them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from specserve.core.plan import AdapterLoad
from specserve.device import Mark, SideStream
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.pool import AdapterPool

HostAdapters = Callable[[str], tuple[HostAdapter, HostAdapter | None]]
"""Adapter version → target LoRA and draft companion in the host tier."""


@dataclass(frozen=True, slots=True)
class _OnItsWay:
    """`sources` is kept so that nothing else is read into their memory while the device still copies out of it."""

    load: AdapterLoad
    end: Mark
    sources: tuple[HostAdapter, HostAdapter | None]


class AdapterLoads:
    """Loads of all models' pools (target's, then draft's), in order, on a queue of the device of their own.

    A load waits for the steps submitted before it, which may still read what its slot held; nothing waits for a load:
    its slot is named in no step until `ended` has told of it.
    """

    def __init__(self, pools: Sequence[AdapterPool], host_adapters: HostAdapters, device: torch.device) -> None:
        self._pools = pools
        self._host_adapters = host_adapters
        self._stream = SideStream(device)
        self._on_their_way: deque[_OnItsWay] = deque()

    def begin(self, loads: Sequence[AdapterLoad]) -> None:
        """Queue loads. On a CPU they are done at once."""
        for load in loads:
            sources = self._host_adapters(load.version)
            with self._stream.entered():
                for pool, adapter in zip(self._pools, sources, strict=False):
                    pool.load_slot(load.slot, adapter)
            self._on_their_way.append(_OnItsWay(load, self._stream.mark(), sources))

    def ended(self) -> list[AdapterLoad]:
        """Loads that ended since the last call, in the order in which they began. Never waits."""
        ended: list[AdapterLoad] = []
        while self._on_their_way and self._on_their_way[0].end.passed():
            ended.append(self._on_their_way.popleft().load)
        return ended
