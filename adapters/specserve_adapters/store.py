"""The host tier: adapters in host memory under a byte budget, by content."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from specserve_adapters.host_adapter import HostAdapter


@dataclass(frozen=True, slots=True, eq=False)
class StoredAdapter:
    """One version: the target's LoRA and its draft companion, if it has one."""

    version: str
    target: HostAdapter
    draft: HostAdapter | None

    @property
    def num_bytes(self) -> int:
        return self.target.num_bytes + (self.draft.num_bytes if self.draft is not None else 0)

    @property
    def rank(self) -> int:
        """The largest rank in it, companion included."""
        return max(self.target.rank, self.draft.rank if self.draft is not None else 0)


class HostStore:
    """Versions in host memory. Those referenced by a request or pinned stay; of the others, the one used longest ago
    is evicted first when room is needed. `max_bytes` is exceeded only by `put(…, force=True)`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._adapters: dict[str, StoredAdapter] = {}  # least recently used first
        self._idle: dict[str, None] = {}  # those of them that may be evicted, in the same order
        self._idle_bytes = 0
        self._refs: dict[str, int] = {}  # > 0
        self._pinned: frozenset[str] = frozenset()

    @property
    def pinned(self) -> frozenset[str]:
        """Versions that stay."""
        return self._pinned

    @pinned.setter
    def pinned(self, versions: frozenset[str]) -> None:
        if versions != self._pinned:
            self._pinned = versions
            self._idle = dict.fromkeys(version for version in self._adapters if self._is_idle(version))
            self._idle_bytes = sum(self._adapters[version].num_bytes for version in self._idle)

    def get(self, version: str) -> StoredAdapter | None:
        return self._adapters.get(version)

    def __contains__(self, version: object) -> bool:
        return version in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def refs(self, version: str) -> int:
        return self._refs.get(version, 0)

    def can_ever_fit(self, adapter: StoredAdapter) -> bool:
        """Whether it would fit if no request were there: beside the pinned ones alone."""
        pinned = (self._adapters[version] for version in self.pinned if version in self._adapters)
        others = sum(other.num_bytes for other in pinned if other.version != adapter.version)
        return adapter.num_bytes + others <= self.max_bytes

    def put(self, adapter: StoredAdapter, *, force: bool = False) -> list[str] | None:
        """Take it in: the versions evicted for it, or None (and nothing changes) when too little can be evicted now.

        `force` takes it in whatever the budget says, evicting what can be. A version that is there already is kept.
        """
        version = adapter.version
        if version in self._adapters:
            self._touch(version)
            return []
        over = self.num_bytes + adapter.num_bytes - self.max_bytes
        if not force and over > self._idle_bytes:
            return None
        victims = self._evict(over)
        self._adapters[version] = adapter
        self.num_bytes += adapter.num_bytes
        self._touch(version)
        return victims

    def trim(self) -> list[str]:
        """Return to the budget as far as possible: the versions evicted for it."""
        return self._evict(self.num_bytes - self.max_bytes)

    def acquire(self, version: str) -> None:
        """A request needs it: it stays until `release`."""
        assert version in self._adapters
        self._refs[version] = self.refs(version) + 1
        self._touch(version)

    def release(self, version: str) -> None:
        """Undo one `acquire`."""
        refs = self._refs.pop(version, 0)
        assert refs > 0, f"{version} is not in use"
        if refs > 1:
            self._refs[version] = refs - 1
        self._touch(version)

    def drop(self, version: str) -> None:
        """Free the memory of a version that nobody references."""
        assert not self.refs(version), f"{version} is in use"
        self._take_from_idle(version)
        self.num_bytes -= self._adapters.pop(version).num_bytes

    def check_integrity(self) -> None:
        """The byte count is the sum, references are to what is there, and only those in use exceed the budget."""
        assert self.num_bytes == sum(adapter.num_bytes for adapter in self._adapters.values())
        assert self._refs.keys() <= self._adapters.keys()
        assert all(count > 0 for count in self._refs.values())
        assert list(self._idle) == [version for version in self._adapters if self._is_idle(version)]
        assert self._idle_bytes == sum(self._adapters[version].num_bytes for version in self._idle)
        assert self.num_bytes <= self.max_bytes or not self._idle

    def _is_idle(self, version: str) -> bool:
        return version not in self._refs and version not in self._pinned

    def _evict(self, num_bytes: int) -> list[str]:
        victims: list[str] = []
        while num_bytes > 0 and self._idle:
            victim = next(iter(self._idle))
            num_bytes -= self._adapters[victim].num_bytes
            self.drop(victim)
            victims.append(victim)
        return victims

    def _touch(self, version: str) -> None:
        """It is the most recently used now, and idle or not by the references that it has now."""
        self._take_from_idle(version)
        self._adapters[version] = self._adapters.pop(version)
        if self._is_idle(version):
            self._idle[version] = None
            self._idle_bytes += self._adapters[version].num_bytes

    def _take_from_idle(self, version: str) -> None:
        if version in self._idle:
            del self._idle[version]
            self._idle_bytes -= self._adapters[version].num_bytes
