"""The registered names: which entry each means now, which are pinned, and what the API lists of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from specserve.core.errors import AdapterError, NotFoundError
from specserve.core.messages import AdapterInfo
from specserve_adapters.entry import AdapterSource, Entry, NameRecord


class Catalogue:
    """Names in the order of their registration."""

    def __init__(self) -> None:
        self._records: dict[str, NameRecord] = {}

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
        return self._records.setdefault(source.name, NameRecord(source.name, source))

    def remove(self, record: NameRecord) -> None:
        del self._records[record.name]

    def current(self, record: NameRecord) -> Entry:
        """What a request for this name gets now."""
        if record.current is None:
            record.current = Entry(record, record.source)
        return record.current

    def is_current(self, entry: Entry) -> bool:
        return entry.record.current is entry and self._records.get(entry.record.name) is entry.record

    def versions(self, *, pinned: bool = False) -> frozenset[str]:
        """Loaded versions that a name means now, or a pinned name."""
        records = (record for record in self if record.pinned or not pinned)
        return frozenset(rec.current.version for rec in records if rec.current is not None and rec.current.loaded)

    def pins(self, without: NameRecord | None = None) -> set[object]:
        """What holds or will hold a slot by being pinned: the current entries, or names that have none."""
        return {record.current or record for record in self if record.pinned and record is not without}

    def forget(self, versions: Collection[str]) -> None:
        """These left the host tier: who needs them next reads them anew."""
        for record in self if versions else ():
            if record.current is not None and record.current.version in versions:
                record.current = None

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


def adapter_info(record: NameRecord, slot: int | None) -> AdapterInfo:
    """What the API lists; `slot` is the device slot of the current version, if it has one."""
    loaded = record.current is not None and record.current.loaded
    return AdapterInfo(
        name=record.name,
        path=str(record.source.path),
        version=record.version,
        tier="device" if slot is not None else "host" if loaded else "disk",
        slot=slot,
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
