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
        self.pinned: frozenset[str] = frozenset()
        self._adapters: dict[str, StoredAdapter] = {}  # least recently used first
        self._refs: dict[str, int] = {}  # > 0

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
        if adapter.version in self._adapters:
            self._touch(adapter.version)
            return []
        over = self.num_bytes + adapter.num_bytes - self.max_bytes
        if not force and over > sum(self._adapters[version].num_bytes for version in self._evictable()):
            return None
        victims = self._evict(over)
        self._adapters[adapter.version] = adapter
        self.num_bytes += adapter.num_bytes
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
        self.num_bytes -= self._adapters.pop(version).num_bytes

    def check_integrity(self) -> None:
        """The byte count is the sum, references are to what is there, and only those in use exceed the budget."""
        assert self.num_bytes == sum(adapter.num_bytes for adapter in self._adapters.values())
        assert self._refs.keys() <= self._adapters.keys()
        assert all(count > 0 for count in self._refs.values())
        assert self.num_bytes <= self.max_bytes or not self._evictable()

    def _evictable(self) -> list[str]:
        return [version for version in self._adapters if not self.refs(version) and version not in self.pinned]

    def _evict(self, num_bytes: int) -> list[str]:
        victims: list[str] = []
        for version in self._evictable() if num_bytes > 0 else ():
            if num_bytes <= 0:
                break
            num_bytes -= self._adapters[version].num_bytes
            self.drop(version)
            victims.append(version)
        return victims

    def _touch(self, version: str) -> None:
        self._adapters[version] = self._adapters.pop(version)
