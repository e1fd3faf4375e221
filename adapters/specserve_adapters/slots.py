"""Which adapter version lies in which device slot: plain bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator


class SlotTable:
    """S slots with use counts. A slot that is used or pinned is never given away; of the others, the one used longest
    ago goes first. Versions are content hashes; `pinned` names those that keep their slot."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.pinned: frozenset[str] = frozenset()
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[str, int] = {}  # version → slot, least recently used first
        self._uses: dict[str, int] = {}  # version → uses, > 0

    def slot_of(self, version: str) -> int | None:
        """The slot that holds `version`, used or warm."""
        return self._slots.get(version)

    def uses(self, version: str) -> int:
        """How often `version` is taken now."""
        return self._uses.get(version, 0)

    def __iter__(self) -> Iterator[str]:
        """Versions in slots, least recently used first."""
        return iter(self._slots)

    def can_take(self, versions: Collection[str]) -> bool:
        """Whether all of these can be taken together now."""
        wanted = set(versions)
        missing = sum(version not in self._slots for version in wanted)
        return missing <= len(self._free) + sum(self._evictable(version) for version in self._slots.keys() - wanted)

    def take(self, version: str) -> tuple[int, bool] | None:
        """Use `version` once more: (slot, whether it must be loaded there first). None: no slot can be freed now."""
        slot = self._slots.pop(version, None)
        needs_load = slot is None
        if slot is None:
            slot = self._free_slot()
        if slot is None:
            return None
        self._slots[version] = slot
        self._uses[version] = self.uses(version) + 1
        return slot, needs_load

    def release(self, version: str) -> None:
        """Undo one `take`; the slot stays warm."""
        uses = self._uses.pop(version, 0)
        assert uses > 0, f"{version} is not in use"
        if uses > 1:
            self._uses[version] = uses - 1
        self._slots[version] = self._slots.pop(version)  # now the most recently used

    def forget(self, version: str) -> None:
        """Give up the warm slot of an unused version, if it has one."""
        assert not self.uses(version), f"{version} is in use"
        slot = self._slots.pop(version, None)
        if slot is not None:
            self._free.append(slot)

    def check_integrity(self) -> None:
        """Every slot is free or holds one version; only held versions are used."""
        assert sorted([*self._free, *self._slots.values()]) == list(range(self.num_slots))
        assert self._uses.keys() <= self._slots.keys()
        assert all(count > 0 for count in self._uses.values())

    def _evictable(self, version: str) -> bool:
        return not self.uses(version) and version not in self.pinned

    def _free_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = next((version for version in self._slots if self._evictable(version)), None)
        return None if victim is None else self._slots.pop(victim)
