"""Which adapter version lies in which device slot: plain bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple


class Taken(NamedTuple):
    """What one `take` gave: whether the slot must be loaded first, and which version lost it."""

    slot: int
    needs_load: bool
    evicted: str | None


class SlotTable:
    """S slots with use counts. A slot that is used or pinned is never given away; of the others, the one used longest
    ago goes first. Versions are content hashes.

    Loads of one slot end in the order in which they began, so that it holds what it stands for once none is under way.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slots: dict[str, int] = {}  # version → slot, least recently used first
        self._idle: dict[str, None] = {}  # those of them that may be given away, in the same order
        self._uses: dict[str, int] = {}  # version → uses, > 0
        self._loading = [0] * num_slots  # loads under way
        self._pinned: frozenset[str] = frozenset()

    @property
    def pinned(self) -> frozenset[str]:
        """Versions that keep their slot."""
        return self._pinned

    @pinned.setter
    def pinned(self, versions: frozenset[str]) -> None:
        if versions != self._pinned:
            self._pinned = versions
            self._idle = dict.fromkeys(version for version in self._slots if self._is_idle(version))

    def slot_of(self, version: str) -> int | None:
        """The slot that stands for `version`, used or warm."""
        return self._slots.get(version)

    def is_live(self, version: str) -> bool:
        """Whether a slot holds `version`, all of it."""
        slot = self._slots.get(version)
        return slot is not None and not self._loading[slot]

    @property
    def num_loading(self) -> int:
        """Loads under way, into whatever slots."""
        return sum(self._loading)

    def uses(self, version: str) -> int:
        """How often `version` is taken now."""
        return self._uses.get(version, 0)

    def __iter__(self) -> Iterator[str]:
        """Versions in slots, least recently used first."""
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def can_take(self, versions: Collection[str]) -> bool:
        """Whether all of these can be taken together now."""
        wanted = set(versions)
        missing = sum(version not in self._slots for version in wanted)
        return missing <= len(self._free) + len(self._idle) - sum(version in self._idle for version in wanted)

    def take(self, version: str) -> Taken | None:
        """Use `version` once more. None: no slot can be freed now."""
        slot, evicted = self._slots.pop(version, None), None
        needs_load = slot is None
        if slot is None:
            if self._free:
                slot = self._free.pop()
            elif self._idle:
                evicted = next(iter(self._idle))
                del self._idle[evicted]
                slot = self._slots.pop(evicted)
            else:
                return None
            self._loading[slot] += 1
        self._slots[version] = slot
        self._idle.pop(version, None)
        self._uses[version] = self.uses(version) + 1
        return Taken(slot, needs_load, evicted)

    def loaded(self, slot: int) -> None:
        """The oldest load of `slot` ended."""
        assert self._loading[slot] > 0, f"no load of slot {slot} is under way"
        self._loading[slot] -= 1

    def release(self, version: str) -> None:
        """Undo one `take`; the slot stays warm."""
        uses = self._uses.pop(version, 0)
        assert uses > 0, f"{version} is not in use"
        if uses > 1:
            self._uses[version] = uses - 1
        self._slots[version] = self._slots.pop(version)  # now the most recently used
        if self._is_idle(version):
            self._idle[version] = None

    def forget(self, version: str) -> bool:
        """Give up the warm slot of an unused version; whether it had one."""
        assert not self.uses(version), f"{version} is in use"
        slot = self._slots.pop(version, None)
        self._idle.pop(version, None)
        if slot is not None:
            self._free.append(slot)
        return slot is not None

    def check_integrity(self) -> None:
        """Every slot is free or stands for one version; only those are used, and what may go is in order of use."""
        assert sorted([*self._free, *self._slots.values()]) == list(range(self.num_slots))
        assert self._uses.keys() <= self._slots.keys()
        assert all(count > 0 for count in self._uses.values())
        assert all(count >= 0 for count in self._loading)
        assert list(self._idle) == [version for version in self._slots if self._is_idle(version)]

    def _is_idle(self, version: str) -> bool:
        return version not in self._uses and version not in self._pinned
