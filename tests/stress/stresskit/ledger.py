"""What a request may get: the contents that its names could mean, by the rules that adapters/README.md promises.

The adapter's version is the one in memory when the request arrives. If there is none, it is what the folder holds when
it is read: something between the moment from which a read may have been under way and the request's first word.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specserve.core.messages import AdapterInfo
from stresskit.contents import BROKEN


@dataclass
class Name:
    """A registered name. `since`: when the load that it stands for was asked for."""

    path: str
    since: int
    reading_from: int | None = None  # a read for waiting requests may have been under way since then
    requests: int = 0  # of this life of the name
    tokens: int = 0


@dataclass(frozen=True)
class Meaning:
    """One adapter of one request: its one content, or None: whatever `path` held from `since` to its first word."""

    path: str
    since: int
    content: str | None


@dataclass
class Ledger:
    """The test's own account, written before and after each call; `now` counts what was done."""

    now: int = 0
    names: dict[str, Name] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)  # version → content, of everything ever written
    sizes: dict[str, int] = field(default_factory=dict)  # version → bytes in host memory, of everything seen there
    _written: dict[str, list[tuple[int, str]]] = field(default_factory=dict)

    def wrote(self, path: str, content: str, version: str = "") -> None:
        self.now += 1
        self._written.setdefault(path, []).append((self.now, content))
        if version:
            self.contents[version] = content

    def holds(self, path: str) -> str:
        return self._written[path][-1][1]

    def held(self, path: str, since: int) -> frozenset[str]:
        """What a read of the folder at some moment from `since` on may have found."""
        written = self._written[path]
        before = [content for moment, content in written if moment <= since]
        return frozenset([before[-1], *(content for moment, content in written if moment > since)])

    def loaded(self, name: str, path: str, since: int) -> None:
        """A load has ended well; it was asked for at `since`. Of two, the one asked for last decides."""
        known = self.names.setdefault(name, Name(path, since))
        if since >= known.since:
            known.path, known.since = path, since

    def see(self, info: AdapterInfo) -> str | None:
        """Note what the engine says of a name: its content if it is in memory. What was read last, in memory or not,
        must be something that could be read since the load that decides."""
        name = self.names[info.name]
        content = self.contents[info.version]
        assert info.path == name.path, f"{info} is not from {name.path}"
        assert content in self.held(name.path, name.since), f"{info} is {content}, which was not there"
        assert info.num_bytes is not None
        self.sizes[info.version] = info.num_bytes
        if info.tier == "disk":
            return None
        name.reading_from = None
        return content

    def means(self, info: AdapterInfo) -> Meaning:
        """What a request that arrives now gets."""
        self.now += 1
        name = self.names[info.name]
        content = self.see(info)
        if content is None:
            self.begin_read(info.name)
        return Meaning(name.path, name.since if name.reading_from is None else name.reading_from, content)

    def begin_read(self, name: str) -> None:
        """Something asks for this name, which is not in memory."""
        known = self.names[name]
        if known.reading_from is None:
            known.reading_from = self.now

    def quiet(self) -> None:
        """Nothing is being read."""
        for name in self.names.values():
            name.reading_from = None

    def may_be_read(self, path: str) -> bool:
        """Whether somebody may be reading this folder for requests right now."""
        return any(name.path == path and name.reading_from is not None for name in self.names.values())

    def resolve(self, meaning: Meaning) -> frozenset[str]:
        """The contents that it may have, as of its request's first word."""
        return frozenset([meaning.content]) if meaning.content else self.held(meaning.path, meaning.since)

    def size(self, meaning: Meaning) -> int | None:
        """At most so many bytes; None where a version was never seen in memory."""
        wanted = self.resolve(meaning) - {BROKEN}
        sizes = [self.sizes.get(version) for version, content in self.contents.items() if content in wanted]
        return None if None in sizes else max((size for size in sizes if size is not None), default=0)
