"""FakeAdapters: what the scheduler sees of an AdapterManager, with reads and copies that take a number of steps."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from specserve.core.errors import AdapterError
from specserve.core.messages import LoraRef
from specserve.core.plan import AdapterLoad

Version = str


@dataclass(slots=True, eq=False)
class FakeEntry:
    """A name's version. It can be used once `read`, and never if it is `broken`."""

    version: Version
    weight: float = 1.0
    broken: bool = False
    reading: bool = False
    read: bool = False
    refs: int = 0


@dataclass(frozen=True, slots=True)
class FakeUse:
    entry: FakeEntry
    scale: float


Uses = tuple[FakeUse, ...]


class FakeAdapters:
    """`num_slots` slots; `tick` is a step's time: `read_steps` of them read an adapter, one after the other, and
    `load_steps` fill a slot (0: a load is done when it begins). Names that begin with "bad" cannot be read."""

    def __init__(self, num_slots: int = 4, *, read_steps: int = 0, load_steps: int = 0) -> None:
        self.num_slots, self.read_steps, self.load_steps = num_slots, read_steps, load_steps
        self.weights: dict[str, float] = {}
        self.entries: dict[str, FakeEntry] = {}
        self.reads: deque[tuple[FakeEntry, int]] = deque()
        self.slots: dict[Version, int] = {}  # least recently used first
        self.uses: Counter[Version] = Counter()
        self.contents: dict[int, Version] = {}
        self.copies: deque[tuple[AdapterLoad, int]] = deque()
        self.asked: Counter[str] = Counter()  # calls, by method
        self.now = 0
        self.num_loads = 0

    def reload(self, name: str) -> None:
        """The name means another version from now on."""
        self.entries.pop(name, None)

    def acquire(self, refs: tuple[LoraRef, ...]) -> Uses:
        uses = tuple(FakeUse(self._current(ref.name), ref.scale) for ref in refs)
        for use in uses:
            use.entry.refs += 1
        return uses

    def _current(self, name: str) -> FakeEntry:
        entry = self.entries.get(name)
        if entry is None or (entry.broken and entry.read):
            self.num_loads += 1
            entry = FakeEntry(f"{name}@{self.num_loads}", self.weights.get(name, 1.0), broken=name.startswith("bad"))
            self.entries[name] = entry
        return entry

    def prepare(self, uses: Uses) -> bool:
        self.asked["prepare"] += 1
        if any(use.entry.broken and use.entry.read for use in uses):
            raise AdapterError("it is broken", param="lora")
        for use in uses:
            if not use.entry.reading:
                use.entry.reading = True
                begin = max(self.now, self.reads[-1][1] if self.reads else 0)
                self.reads.append((use.entry, begin + self.read_steps))
        self._settle()
        return all(use.entry.read and not use.entry.broken for use in uses)

    def tick(self) -> None:
        """A step's time passes."""
        self.now += 1
        self._settle()

    def _settle(self) -> None:
        while self.reads and self.reads[0][1] <= self.now:
            self.reads.popleft()[0].read = True
        while self.copies and self.copies[0][1] <= self.now:
            load, _ = self.copies.popleft()
            self.contents[load.slot] = load.version

    def begin(self, loads: list[AdapterLoad]) -> None:
        for load in loads:
            self.contents.pop(load.slot, None)
            self.copies.append((load, self.now + self.load_steps))
        self._settle()

    def take_slots(self, uses: Uses) -> tuple[tuple[tuple[int, float], ...], list[AdapterLoad]] | None:
        self.asked["take_slots"] += 1
        assert all(use.entry.read for use in uses), "not in host memory"
        versions = list(dict.fromkeys(use.entry.version for use in uses))
        missing = [version for version in versions if version not in self.slots]
        idle = [version for version in self.slots if not self.uses[version] and version not in versions]
        if len(missing) > self.num_slots - len(self.slots) + len(idle):
            return None
        loads = []
        for version in missing:
            slot = self._free_slot(idle)
            self.slots[version] = slot
            loads.append(AdapterLoad(slot, version))
        self.uses.update(versions)
        return tuple((self.slots[version], 1.0) for version in versions), loads

    def _free_slot(self, idle: list[Version]) -> int:
        if len(self.slots) < self.num_slots:
            return min(set(range(self.num_slots)) - set(self.slots.values()))
        return self.slots.pop(idle.pop(0))

    def slots_live(self, uses: Uses) -> bool:
        self.asked["slots_live"] += 1
        return all(self.contents.get(self.slots.get(use.entry.version, -1)) == use.entry.version for use in uses)

    def check_live(self, pairs: tuple[tuple[int, float], ...]) -> None:
        """Assert that a row names slots that are whole and that it holds."""
        used = {self.slots[version]: version for version in self.slots if self.uses[version]}
        assert all(self.contents.get(slot) == used[slot] for slot, _ in pairs), "a row names a slot that is not live"

    def release_slots(self, uses: Uses) -> None:
        for version in {use.entry.version for use in uses}:
            assert self.uses[version] > 0, "released twice"
            self.uses[version] -= 1
            self.slots[version] = self.slots.pop(version)

    def release(self, uses: Uses) -> None:
        for use in uses:
            use.entry.refs -= 1
            assert use.entry.refs >= 0

    def cache_key(self, uses: Uses) -> list[tuple[str, float]]:
        return sorted((use.entry.version, use.scale) for use in uses)

    def weight_of(self, uses: Uses) -> float:
        return min((use.entry.weight for use in uses), default=1.0)

    def count_tokens(self, uses: object, tokens: int, drafted: int, accepted: int) -> None: ...

    def check_unused(self) -> None:
        """Assert that all requests gave back what they had."""
        assert not any(self.uses.values()), "slots leaked"
        assert not any(entry.refs for entry in self.entries.values()), "references leaked"
