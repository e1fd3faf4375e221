"""Who owns the adapters: writes their folders, breaks them, and has them loaded, pinned and unloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specserve.core.messages import LoadAdapter, PinAdapter, Reply, UnloadAdapter
from stresskit.contents import BREAKAGES, BROKEN, CONTENTS, Library, install, same_family, spoil
from stresskit.scene import NAMES, Scene


@dataclass
class Load:
    """A load under way."""

    name: str
    path: str
    since: int
    pinned: bool
    replace: bool
    unloaded: bool = False


class Owner:
    """Every name has a folder of its own under `root`; now and then a name is loaded from another's."""

    def __init__(self, scene: Scene, library: Library, root: Path) -> None:
        self.scene, self.library = scene, library
        self.engine, self.ledger, self.rng = scene.engine, scene.ledger, scene.rng
        self.paths = {name: root / name for name in NAMES}
        self.loads: dict[int, Load] = {}  # by call id

    def begin(self) -> None:
        """All folders are there, and all but two names are loaded."""
        for name in NAMES:
            self._install(self.paths[name], self.rng.choice(CONTENTS))
        for name in NAMES[:-2]:
            self._load(name)

    def end(self) -> None:
        """Whatever has a name is unloaded."""
        for name in sorted(self.ledger.names):
            self._pin(name, False)
            self._unload(name)

    def rewrite(self) -> None:
        """Another content for a folder; most of the time one that nobody may be reading, and a reload of it."""
        name = self.rng.choice(NAMES)
        path = self.paths[name]
        content = self.rng.choice(CONTENTS)
        if self._may_be_read(path):
            old = self.ledger.holds(str(path))
            content = next((new for new in CONTENTS if new != old and same_family(new, old)), "")
            if not content or self.rng.random() < 0.9:
                return
            self._install(path, content, weights_only=True)
        else:
            self._install(path, content)
        if self.rng.random() < 0.6 and name in self.ledger.names:
            self._load(name)

    def spoil(self) -> None:
        """A folder breaks; a reload of it must fail, and so must requests that need to read it."""
        name = self.rng.choice(NAMES)
        reading = self._may_be_read(self.paths[name])
        if reading and self.rng.random() < 0.9:
            return
        how = "truncated" if reading else self.rng.choice(BREAKAGES)
        spoil(self.paths[name], how)
        self.ledger.wrote(str(self.paths[name]), BROKEN)
        self.scene.note(f"{name} is broken: {how}")
        if self.rng.random() < 0.7 and name in self.ledger.names:
            self._load(name)

    def reload(self) -> None:
        if self.ledger.names:
            self._load(self.rng.choice(sorted(self.ledger.names)), other=self.rng.random() < 0.15)

    def hurry(self) -> None:
        """Two reloads one after the other, and another content in between: the second decides."""
        name = self.rng.choice(NAMES)
        old = self.ledger.holds(str(self.paths[name]))
        if name not in self.ledger.names or old == BROKEN or self._may_be_read(self.paths[name]):
            return
        self._load(name)
        content = self.rng.choice([new for new in CONTENTS if new != old and same_family(new, old)])
        self._install(self.paths[name], content, weights_only=True)
        self._load(name)

    def load(self) -> None:
        missing = sorted(set(NAMES) - self.ledger.names.keys())
        if missing:
            self._load(self.rng.choice(missing), pinned=self.rng.random() < 0.2)

    def _load(self, name: str, *, other: bool = False, pinned: bool = False) -> None:
        path = str(self.paths[self.rng.choice(NAMES) if other else name])
        pinned = pinned and not self._pins()
        self.ledger.now += 1
        call_id = self.scene.next_id()
        load = Load(name, path, self.ledger.now, pinned, replace=name in self.ledger.names)
        self.scene.note(f"load {call_id} of {name} from {Path(path).name}{', pinned' * pinned}")
        reply = self.engine.handle(
            LoadAdapter(call_id=call_id, name=name, path=path, pinned=pinned, replace=load.replace)
        )
        self.loads[call_id] = load
        if reply is not None:
            self.replied([reply])

    def replied(self, replies: list[Reply]) -> None:
        """Loads have ended: each as it had to, and the names mean what those that were asked for last say."""
        for reply in replies:
            load = self.loads.pop(reply.call_id)
            self.scene.note(f"load {reply.call_id} of {load.name} ends: {reply.error or 'well'}")
            self.scene.counts["reload" if reply.error is None else "failed load"] += 1
            broken = BROKEN in self.ledger.held(load.path, load.since)
            if reply.error is None:
                assert self.ledger.held(load.path, load.since) != {BROKEN}, load
                self.ledger.loaded(load.name, load.path, load.since)
            elif reply.error.code == "adapter_busy":
                assert load.unloaded or load.pinned or self._is_pinned(load.name), reply
            else:
                assert reply.error.code == "invalid_adapter" and (broken or not load.replace), reply
        for info in (info for reply in replies for info in reply.adapters):
            self.ledger.see(info)

    def unload(self) -> None:
        if self.ledger.names:
            self._unload(self.rng.choice(sorted(self.ledger.names)))

    def _unload(self, name: str) -> None:
        pinned = self._is_pinned(name)
        reply = self.engine.handle(UnloadAdapter(call_id=0, name=name))
        self.scene.note(f"{name} is unloaded: {not pinned}")
        assert reply is not None and (reply.error is not None) == pinned, reply
        if not pinned:
            for load in self.loads.values():
                load.unloaded = load.unloaded or load.name == name
            del self.ledger.names[name]
            self.scene.books.forgotten(name)

    def pin(self) -> None:
        """At most one name is pinned, so that sums of two can be served."""
        for name in filter(self._is_pinned, sorted(self.ledger.names)):
            self._pin(name, False)
        if self.ledger.names and self.rng.random() < 0.6 and not self._pins():
            self._pin(self.rng.choice(sorted(self.ledger.names)), True)

    def _pin(self, name: str, pinned: bool) -> None:
        loaded = self.ledger.see(self.engine.adapters.info(name)) is not None
        reply = self.engine.handle(PinAdapter(call_id=0, name=name, pinned=pinned))
        self.scene.note(f"{name} is pinned: {pinned}, {reply.error if reply else None}")
        assert reply is not None and (reply.error is None or (pinned and reply.error.code == "adapter_busy")), reply
        if pinned and reply.error is None and not loaded:
            self.ledger.begin_read(name)

    def _is_pinned(self, name: str) -> bool:
        return name in self.ledger.names and self.engine.adapters.info(name).pinned

    def _pins(self) -> list[str]:
        """Names that are pinned or about to be."""
        coming = [load.name for load in self.loads.values() if load.pinned and not load.unloaded]
        return [name for name in sorted(self.ledger.names) if self._is_pinned(name)] + coming

    def _install(self, path: Path, content: str, *, weights_only: bool = False) -> None:
        version = install(self.library.folder(content), path, weights_only=weights_only)
        self.ledger.wrote(str(path), content, version)
        self.scene.note(f"{path.name} holds {content}")

    def _may_be_read(self, path: Path) -> bool:
        return self.ledger.may_be_read(str(path)) or any(load.path == str(path) for load in self.loads.values())
