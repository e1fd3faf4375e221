"""Device slots of requests: taken, on their way, live, given back."""

from __future__ import annotations

import time
from collections import deque

from specserve.core.plan import AdapterLoad
from specserve_adapters.entry import merge_uses
from specserve_adapters.library import Library
from specserve_adapters.live import LiveUses, Uses

Placement = tuple[tuple[tuple[int, float], ...], list[AdapterLoad]]


class Placements:
    """What `AdapterManager` says of slots; `loads` that ended, and the `load_seconds` that they took."""

    def __init__(self, library: Library, live: LiveUses) -> None:
        self._tiers = library.tiers
        self._names = library.names
        self._live = live
        self._begun: deque[float] = deque()  # when each load under way began
        self.loads = 0
        self.load_seconds = 0.0

    @property
    def num_loading(self) -> int:
        """Loads that have not ended."""
        return len(self._begun)

    def take(self, uses: Uses) -> Placement | None:
        """All slots of a request, or None."""
        slots, merged = self._tiers.slots, merge_uses(uses)
        if not slots.can_take([version for version, _ in merged]):
            return None
        places: dict[str, int] = {}
        loads: list[AdapterLoad] = []
        # Warm ones first: the others must not push them out.
        for version, _ in sorted(merged, key=lambda pair: slots.slot_of(pair[0]) is None):
            taken = self._tiers.take(version)
            assert taken is not None
            places[version] = taken.slot
            if taken.needs_load:
                loads.append(AdapterLoad(taken.slot, version))
                self._begun.append(time.perf_counter())
                self._names.touch_version(version)
            if taken.evicted is not None:
                self._names.touch_version(taken.evicted)
        self._live.place(uses)
        self._touch(uses)
        return tuple((places[version], scale) for version, scale in merged), loads

    def are_live(self, uses: Uses) -> bool:
        """Whether all of these lie in slots, wholly."""
        return all(self._tiers.slots.is_live(use.entry.version) for use in uses)

    def loaded(self, load: AdapterLoad) -> None:
        """The oldest load under way ended. Its slot may stand for another version by now, whose load is then under way
        behind it, or be free."""
        self._tiers.slots.loaded(load.slot)
        self.loads += 1
        self.load_seconds += time.perf_counter() - self._begun.popleft()
        self._names.touch_version(load.version)

    def release(self, uses: Uses) -> None:
        """Undo one `take`."""
        self._live.unplace(uses)
        for version, _ in merge_uses(uses):
            self._tiers.slots.release(version)
        self._touch(uses)

    def _touch(self, uses: Uses) -> None:
        for use in uses:
            self._names.touch(use.entry.record)
