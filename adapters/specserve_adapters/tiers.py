"""Host tier and device slots as one: what has a slot is in host memory too, so that it can always come back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specserve_adapters.slots import SlotTable
from specserve_adapters.store import HostStore, StoredAdapter


class Tiers:
    """`store` and `slots` under one set of pins; a version that leaves the store gives its warm slot back."""

    def __init__(self, num_slots: int, max_host_bytes: int) -> None:
        self.slots = SlotTable(num_slots)
        self.store = HostStore(max_host_bytes)

    def put(self, stored: StoredAdapter, *, force: bool) -> list[str] | None:
        """`HostStore.put`: the versions evicted, or None for no room now."""
        evicted = self.store.put(stored, force=force)
        self._forget(evicted or ())
        return evicted

    def trim(self) -> list[str]:
        """Return to the byte budget as far as possible: the versions evicted."""
        evicted = self.store.trim()
        self._forget(evicted)
        return evicted

    def pin(self, versions: frozenset[str]) -> None:
        """These, and no others, are never evicted."""
        self.store.pinned = self.slots.pinned = versions

    def keep_only(self, versions: Collection[str]) -> None:
        """Free what is neither referenced by a request nor among these."""
        freed = [version for version in self.store if version not in versions and not self.store.refs(version)]
        for version in freed:
            self.store.drop(version)
        self._forget(freed)

    def check_integrity(self) -> None:
        self.store.check_integrity()
        self.slots.check_integrity()
        assert set(self.slots) <= set(self.store)

    def _forget(self, versions: Sequence[str]) -> None:
        for version in versions:
            self.slots.forget(version)
