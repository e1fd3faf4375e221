"""Names and tiers as one: what no name and no request means any more is freed, what is pinned stays."""

from __future__ import annotations

from specserve.core.messages import AdapterInfo
from specserve_adapters.catalogue import Catalogue, adapter_info
from specserve_adapters.entry import NameRecord
from specserve_adapters.room import pin_name
from specserve_adapters.store import StoredAdapter
from specserve_adapters.tiers import Tiers


class Library:
    """`names` and `tiers`, kept to each other."""

    def __init__(self, num_slots: int, max_host_bytes: int) -> None:
        self.names = Catalogue()
        self.tiers = Tiers(num_slots, max_host_bytes)

    def put(self, stored: StoredAdapter, *, force: bool) -> bool:
        """Take it into the host tier, whatever the budget says if `force`. False: no room now."""
        evicted = self.tiers.put(stored, force=force)
        if evicted is None:
            return False
        self.names.forget(evicted)
        return True

    def trim(self) -> None:
        """Return to the byte budget as far as possible."""
        self.names.forget(self.tiers.trim())

    def reclaim(self, version: str) -> None:
        """Free `version` if it is in memory and neither a name nor a request needs it."""
        store = self.tiers.store
        if version in store and not store.refs(version) and not self.names.meaning(version):
            self.tiers.drop(version)

    def pin(self, record: NameRecord, pinned: bool) -> None:
        """Pin a name: whatever it means stays."""
        if pinned:
            pin_name(record, self.names, self.tiers.slots.num_slots)
        else:
            self.names.pin(record, False)
        self.sync_pins()

    def sync_pins(self) -> None:
        """To be called when a pinned name has come to mean something else."""
        self.tiers.pin(self.names.pinned_versions())
        self.trim()

    def info(self, record: NameRecord) -> AdapterInfo:
        """What the API lists of a name."""
        version = record.current.version if record.current is not None else ""
        slots = self.tiers.slots
        return adapter_info(record, slots.slot_of(version), live=slots.is_live(version))

    def changed(self) -> tuple[list[AdapterInfo], list[str]]:
        """What changed since the last call: infos as they are now, and the names that are gone."""
        changed = [(name, self.names.find(name)) for name in self.names.take_changed()]
        infos = [self.info(record) for _, record in changed if record is not None]
        return infos, [name for name, record in changed if record is None]

    def check_integrity(self) -> None:
        self.names.check_integrity()
        self.tiers.check_integrity()
        assert self.tiers.store.pinned == self.tiers.slots.pinned == self.names.pinned_versions()
