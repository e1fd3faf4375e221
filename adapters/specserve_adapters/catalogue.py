"""The registered names: which entry each means now, which are pinned, and what the API lists of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from specserve.core.errors import AdapterError, NotFoundError
from specserve.core.messages import AdapterInfo
from specserve_adapters.entry import AdapterSource, Entry, NameRecord


class Catalogue:
    """Names in the order of their registration. Whatever is asked at every step or request takes the same time with
    thousands of them: which names mean a version, which are pinned, and which changed is kept, not searched for."""

    def __init__(self) -> None:
        self._records: dict[str, NameRecord] = {}
        self._pinned: dict[str, NameRecord] = {}
        self._meaning: dict[str, set[NameRecord]] = {}  # version → names whose current entry is of it, never empty
        self._changed: dict[str, None] = {}  # names, in order; those that are gone among them

    def __iter__(self) -> Iterator[NameRecord]:
        return iter(self._records.values())

    def find(self, name: str) -> NameRecord | None:
        return self._records.get(name)

    def get(self, name: str, param: str = "name") -> NameRecord:
        """Raises NotFoundError, naming the request's field `param`."""
        record = self._records.get(name)
        if record is None:
            raise NotFoundError(f"The adapter {name!r} does not exist.", param=param)
        return record

    def add(self, source: AdapterSource) -> NameRecord:
        """The record of the source's name, new if need be."""
        record = self._records.setdefault(source.name, NameRecord(source.name, source))
        self.touch(record)
        return record

    def remove(self, record: NameRecord) -> None:
        """Its entries go on for the requests that have them."""
        self._means_no_more(record)
        self.pin(record, False)
        del self._records[record.name]

    def pin(self, record: NameRecord, pinned: bool) -> None:
        record.pinned = pinned
        if pinned:
            self._pinned[record.name] = record
        else:
            self._pinned.pop(record.name, None)
        self.touch(record)

    # --- what names mean ------------------------------------------------------------------------------------------

    def current(self, record: NameRecord) -> Entry:
        """What a request for this name gets now."""
        if record.current is None:
            record.current = Entry(record, record.source)
        return record.current

    def set_current(self, record: NameRecord, entry: Entry | None) -> None:
        """What requests for this name get from now on; None: a new entry, to be read."""
        self._means_no_more(record)
        record.current = entry
        if entry is not None and entry.loaded and self.is_current(entry):
            self._meaning.setdefault(entry.version, set()).add(record)
        self.touch(record)

    def fill(self, entry: Entry, version: str) -> None:
        """The entry is of this version, for ever."""
        assert not entry.loaded
        entry.version = version
        if self.is_current(entry):
            self.set_current(entry.record, entry)

    def is_current(self, entry: Entry) -> bool:
        return entry.record.current is entry and self._records.get(entry.record.name) is entry.record

    def meaning(self, version: str) -> Collection[NameRecord]:
        """The names whose next request gets this version."""
        return self._meaning.get(version, ())

    def forget(self, versions: Collection[str]) -> None:
        """These left the host tier: who needs them next reads them anew."""
        for version in versions:
            for record in list(self.meaning(version)):
                self.set_current(record, None)

    def _means_no_more(self, record: NameRecord) -> None:
        if record.current is None:
            return
        names = self._meaning.get(record.current.version)
        if names is not None:
            names.discard(record)
            if not names:
                del self._meaning[record.current.version]

    # --- pins -----------------------------------------------------------------------------------------------------

    def pinned_versions(self) -> frozenset[str]:
        """Loaded versions that a pinned name means."""
        records = self._pinned.values()
        return frozenset(rec.current.version for rec in records if rec.current is not None and rec.current.loaded)

    def pins(self, without: NameRecord | None = None) -> set[object]:
        """What holds or will hold a slot by being pinned: the current entries, or names that have none."""
        return {record.current or record for record in self._pinned.values() if record is not without}

    # --- changes --------------------------------------------------------------------------------------------------

    def touch(self, record: NameRecord) -> None:
        """What the API lists of it changed."""
        if self._records.get(record.name) is record:
            self._changed[record.name] = None

    def touch_version(self, version: str) -> None:
        """What the API lists of the names that mean it changed."""
        for record in self.meaning(version):
            self.touch(record)

    def take_changed(self) -> list[str]:
        """The names that changed or went since the last call."""
        changed, self._changed = list(self._changed), {}
        return changed

    def check_integrity(self) -> None:
        """What is kept beside the records agrees with them."""
        meaning: dict[str, set[NameRecord]] = {}
        for record in self:
            if record.current is not None and record.current.loaded:
                meaning.setdefault(record.current.version, set()).add(record)
        assert self._meaning == meaning
        assert set(self._pinned.values()) == {record for record in self if record.pinned}

    def check(self, source: AdapterSource, replace: bool, version: str = "") -> None:
        """Raise AdapterError if the name means something else than `source` (or than its `version`, once read)."""
        record = self._records.get(source.name)
        if record is None or replace:
            return
        if record.source != source:
            raise AdapterError(
                f"The adapter {source.name!r} exists already, from {record.source.path}; unload or replace it.",
                param="name",
            )
        if version and record.current is not None and record.current.version not in ("", version):
            raise AdapterError(
                f"The folder of adapter {source.name!r} has changed since it was loaded; ask to replace it.",
                param="name",
            )


def adapter_info(record: NameRecord, slot: int | None, *, live: bool) -> AdapterInfo:
    """What the API lists; `slot` is the device slot of the current version, if it has one, `live` once it is copied."""
    loaded = record.current is not None and record.current.loaded
    reading = record.current is not None and record.current.reading
    return AdapterInfo(
        name=record.name,
        path=str(record.source.path),
        version=record.version,
        tier="device" if live else "host" if loaded else "disk",
        state="reading" if reading else "loading" if slot is not None and not live else None,
        slot=slot if live else None,
        rank=record.rank,
        num_bytes=record.num_bytes,
        weight=record.weight,
        pinned=record.pinned,
        has_draft=record.has_draft,
        running=record.running,
        requests=record.requests,
        tokens=record.tokens,
        drafted=record.drafted,
        accepted=record.accepted,
        last_used=record.last_used,
    )
