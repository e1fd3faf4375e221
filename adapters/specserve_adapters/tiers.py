"""Host tier and device slots as one: what has a slot is in host memory too, so that it can always come back."""

from __future__ import annotations

from specserve_adapters.slots import SlotTable, Taken
from specserve_adapters.store import HostStore, StoredAdapter


class Tiers:
    """`store` and `slots` under one set of pins; a version that leaves the store gives its warm slot back.

    `evictions_host` and `evictions_device` count what had to go to make room.
    """

    def __init__(self, num_slots: int, max_host_bytes: int) -> None:
        self.slots = SlotTable(num_slots)
        self.store = HostStore(max_host_bytes)
        self.evictions_host = 0
        self.evictions_device = 0

    def put(self, stored: StoredAdapter, *, force: bool) -> list[str] | None:
        """`HostStore.put`: the versions evicted, or None for no room now."""
        evicted = self.store.put(stored, force=force)
        return None if evicted is None else self._evicted(evicted)

    def trim(self) -> list[str]:
        """Return to the byte budget as far as possible: the versions evicted."""
        return self._evicted(self.store.trim())

    def take(self, version: str) -> Taken | None:
        """`SlotTable.take`."""
        taken = self.slots.take(version)
        self.evictions_device += taken is not None and taken.evicted is not None
        return taken

    def pin(self, versions: frozenset[str]) -> None:
        """These, and no others, are never evicted."""
        self.store.pinned = self.slots.pinned = versions

    def drop(self, version: str) -> None:
        """Free the memory and the slot of a version that nobody references."""
        self.store.drop(version)
        self.slots.forget(version)

    def check_integrity(self) -> None:
        self.store.check_integrity()
        self.slots.check_integrity()
        assert set(self.slots) <= set(self.store)

    def _evicted(self, versions: list[str]) -> list[str]:
        self.evictions_host += len(versions)
        self.evictions_device += sum(self.slots.forget(version) for version in versions)
        return versions
