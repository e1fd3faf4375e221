"""AdapterManager: names, versions and tiers of all adapters, for the engine and its scheduler.

One owner thread calls everything; only folders are read elsewhere (ReadQueue), and `poll()` brings the results in.

Tiers: every version in a device slot is in the host tier too, so that a request that began on it can always come back.
Versions: a name has a current entry. A request gets the entry that is current when it is acquired and keeps it. If
that entry is not in host memory, its version is decided by the read that the request waits for: it gets what the
folder holds at that moment, whatever was read from it before. An entry evicted from the host tier (no request has it
then) is forgotten; the next request gets a new one, read anew. A reload puts a new entry in place at once, in poll().
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from specserve.core.errors import AdapterBusyError, AdapterError, InvalidRequestError, NotFoundError, SpecserveError
from specserve.core.messages import AdapterInfo, LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.entry import AdapterUse, Entry, LoadTicket, NameRecord, Read, merge_uses, to_float32
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.reading import AdapterSource, ReadQueue, ReadSettings, check_source, read_source
from specserve_adapters.slots import SlotTable
from specserve_adapters.spec import LinearSpec
from specserve_adapters.store import HostStore, StoredAdapter

Uses = tuple[AdapterUse, ...]
# `list` is a method of the class, so its signatures cannot name the type.
Placement = tuple[tuple[tuple[int, float], ...], list[AdapterLoad]]
AdapterInfos = list[AdapterInfo]
AdapterKey = list[tuple[str, float]]
LoadTickets = list[LoadTicket]


class AdapterManager:
    """Adapters of one engine. `draft_specs` None: no draft model, so companions are neither read nor hashed.

    `num_slots` slots of rank ≤ `max_rank` on the device, shared by the target's and the draft's pools;
    `max_host_bytes` for both in the host tier, page-locked with `pin_memory`.
    """

    def __init__(
        self,
        target_specs: Sequence[LinearSpec],
        draft_specs: Sequence[LinearSpec] | None,
        *,
        num_slots: int,
        max_rank: int,
        max_host_bytes: int,
        dtype: torch.dtype,
        draft_dtype: torch.dtype,
        pin_memory: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = ReadSettings(
            target_specs, draft_specs, max_rank, max_host_bytes, dtype, draft_dtype, pin_memory
        )
        self._slots = SlotTable(num_slots)
        self._store = HostStore(max_host_bytes)
        self._names: dict[str, NameRecord] = {}
        self._live: Counter[Uses] = Counter()  # of requests, waiting and running
        self._placed: Counter[Uses] = Counter()  # of requests on a device row
        self._reads: ReadQueue[Read] = ReadQueue(lambda read: read_source(read.source, self._settings))
        self._loading: list[LoadTicket] = []
        self._finished: list[LoadTicket] = []
        self._clock = clock

    # --- names ---------------------------------------------------------------------------------------------------

    def register(self, name: str, path: str | Path, draft_path: str | Path | None = None) -> None:
        """Make `name` known; its folder is looked at, and read when a request first needs it.

        Raises AdapterError: a file is missing, or the name stands for another folder.
        """
        source = _source(name, path, draft_path)
        check_source(source, self._settings)
        self._check_name(source, replace=False)
        self._names.setdefault(name, NameRecord(name, source))

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        draft_path: str | Path | None = None,
        pinned: bool = False,
        replace: bool = False,
    ) -> LoadTicket:
        """Begin to read a folder; `name` means it from the poll() on that returns the ticket without an error.

        Until then, and if it fails, the name means what it did. Contents that are loaded already change nothing. Raises
        AdapterError when the name stands for another folder and `replace` is false, AdapterBusyError when `pinned` and
        no slot can be pinned; the same may come as the ticket's error if it became true meanwhile.
        """
        ticket = LoadTicket(name, _source(name, path, draft_path), pinned, replace)
        self._check_name(ticket.source, replace)
        if pinned:
            self._check_pin(self._names.get(name), ticket)
        self._loading.append(ticket)
        self._reads.submit(Read(ticket.source, ticket))
        return ticket

    def unload(self, name: str) -> None:
        """Forget `name` and end its loads under way. Requests that have it finish; then its memory is freed.

        Raises NotFoundError, and AdapterBusyError while it is pinned.
        """
        record = self._record(name)
        if record.pinned:
            raise AdapterBusyError(f"Adapter {name!r} is pinned; unpin it before unloading it.", param="name")
        del self._names[name]
        for ticket in [ticket for ticket in self._loading if ticket.name == name]:
            self._finish(ticket, AdapterBusyError(f"Adapter {name!r} was unloaded while it was loading.", param="name"))
        self._free_unreachable()

    def pin(self, name: str, pinned: bool) -> None:
        """Pin: it is read if need be, stays in host memory, and keeps its device slot from its first use on.

        Raises NotFoundError, and AdapterBusyError when requests would have too few slots left.
        """
        record = self._record(name)
        if pinned and not record.pinned:
            entry = self._current(record)
            self._check_pin(record, entry)
            self._start_read(entry)
        record.pinned = pinned
        self._sync_pins()

    def info(self, name: str) -> AdapterInfo:
        """One adapter's state. Raises NotFoundError."""
        record = self._record(name)
        entry = record.current
        slot = self._slots.slot_of(entry.version) if entry is not None else None
        return AdapterInfo(
            name=name,
            path=str(record.source.path),
            version=record.version,
            tier="device" if slot is not None else "host" if entry is not None and entry.loaded else "disk",
            slot=slot,
            rank=record.rank,
            num_bytes=record.num_bytes,
            pinned=record.pinned,
            has_draft=record.has_draft,
            running=record.running,
            requests=record.requests,
            tokens=record.tokens,
            drafted=record.drafted,
            accepted=record.accepted,
            last_used=record.last_used,
        )

    def list(self) -> AdapterInfos:
        """All registered adapters, in the order of their registration."""
        return [self.info(name) for name in self._names]

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, refs: tuple[LoraRef, ...]) -> Uses:
        """A request arrives: its adapters' current entries, referenced until `release`.

        Raises NotFoundError, InvalidRequestError (scale out of float32's range, more adapters than slots),
        AdapterBusyError (pinned adapters leave too few slots for it).
        """
        records = [self._record(ref.name, param="lora") for ref in refs]
        scales = [to_float32(ref.scale) for ref in refs]
        to_float32(sum(abs(scale) for scale in scales))  # whatever is summed later stays in range
        uses = tuple(AdapterUse(self._current(record), scale) for record, scale in zip(records, scales, strict=True))
        self._check_slots(uses)
        for use in uses:
            use.entry.refs += 1
            if use.entry.loaded:
                self._store.acquire(use.entry.version)
        for record in set(records):
            record.requests += 1
            record.last_used = self._clock()
        if uses:
            self._live[uses] += 1
        return uses

    def prepare(self, uses: Uses) -> bool:
        """True: all in host memory. False: they are being read; ask again after a poll().

        Raises AdapterError when a read failed, for every request that waited for it; later requests read anew.
        """
        for use in uses:
            if use.entry.error is not None:
                raise AdapterError(use.entry.error.message, param="lora")
        for use in uses:
            self._start_read(use.entry)
        return all(use.entry.loaded for use in uses)

    def take_slots(self, uses: Uses) -> Placement | None:
        """A prepared request takes a device row: its (slot, weight) pairs and what must be loaded into slots first.

        None: no slot can be freed now; nothing was taken.
        """
        merged = merge_uses(uses)
        if not self._slots.can_take([version for version, _ in merged]):
            return None
        pairs: list[tuple[int, float]] = []
        loads: list[AdapterLoad] = []
        for version, scale in merged:
            taken = self._slots.take(version)
            assert taken is not None
            slot, needs_load = taken
            pairs.append((slot, scale))
            if needs_load:
                loads.append(AdapterLoad(slot, version))
        if uses:
            self._placed[uses] += 1
            for record in {use.entry.record for use in uses}:
                record.running += 1
        return tuple(pairs), loads

    def release_slots(self, uses: Uses) -> None:
        """The request left its device row (finished, aborted, preempted); the slots stay warm."""
        if not uses:
            return
        _decrement(self._placed, uses)
        for version, _ in merge_uses(uses):
            self._slots.release(version)
        for record in {use.entry.record for use in uses}:
            record.running -= 1

    def release(self, uses: Uses) -> None:
        """The request is gone, after `release_slots` if it had slots."""
        if not uses:
            return
        _decrement(self._live, uses)
        assert self._placed[uses] <= self._live[uses], "release_slots() comes before release()"
        for use in uses:
            use.entry.refs -= 1
            use.entry.record.last_used = self._clock()
            if use.entry.loaded:
                self._store.release(use.entry.version)
        if not all(self._is_current(use.entry) for use in uses):
            self._free_unreachable()
        self._trim()

    def cache_key(self, uses: Uses) -> AdapterKey:
        """What the adapters add to the identity of cached KV: sorted (version, float32 scale); [] for the base model.

        Only of prepared uses: before, the version may not be known.
        """
        return merge_uses(uses)

    def host(self, version: str) -> tuple[HostAdapter, HostAdapter | None]:
        """Target LoRA and companion of a version that an AdapterLoad names."""
        stored = self._store.get(version)
        assert stored is not None
        return stored.target, stored.draft

    def count_tokens(self, uses: Uses, tokens: int, drafted: int, accepted: int) -> None:
        """Add a request's generated, drafted and accepted tokens to each of its adapters' counters."""
        for record in {use.entry.record for use in uses}:
            record.tokens += tokens
            record.drafted += drafted
            record.accepted += accepted

    # --- reads ---------------------------------------------------------------------------------------------------

    def poll(self) -> LoadTickets:
        """Take in what was read: loads that ended since the last poll, well or badly. Never blocks."""
        while (done := self._reads.finished()) is not None:
            read, result = done
            if not self._settle(read.purpose, result):
                break  # it waits for room, and with it what comes after
            self._reads.pop()
        finished, self._finished = self._finished, []
        return finished

    @property
    def num_reading(self) -> int:
        """Reads that are queued, under way or waiting for room."""
        return len(self._reads)

    def wait(self, timeout: float) -> None:
        """Block until the read under way ends, at most `timeout` seconds: for an engine with nothing else to do."""
        self._reads.wait(timeout)

    def close(self) -> None:
        """End the reading thread."""
        self._reads.close()

    def _settle(self, purpose: Entry | LoadTicket, result: StoredAdapter | AdapterError) -> bool:
        """Deal with one finished read. False: it must wait for room in the host tier."""
        if isinstance(purpose, LoadTicket):
            if purpose.done:  # its name was unloaded meanwhile
                return True
        elif not purpose.refs and not self._is_current(purpose):
            return True
        try:
            if isinstance(result, AdapterError):
                raise result
            self._check_admission(purpose, result)
        except SpecserveError as error:
            self._fail(purpose, error)
            return True
        evicted = self._store.put(result, force=self._stuck())
        if evicted is None:
            return False
        self._forget(evicted)
        if isinstance(purpose, LoadTicket):
            self._install(purpose, result)
        else:
            self._fill(purpose, result)
        self._sync_pins()
        return True

    def _check_admission(self, purpose: Entry | LoadTicket, stored: StoredAdapter) -> None:
        source = purpose.source
        if stored.version not in self._store and not self._store.can_ever_fit(stored):
            raise AdapterError(
                f"Adapter {source.name!r} needs {stored.num_bytes} bytes of host memory; adapters may take "
                f"{self._store.max_bytes}, pinned ones included. Unpin adapters or allow more.",
                param="path",
            )
        if isinstance(purpose, LoadTicket):
            self._check_name(source, purpose.replace, stored.version)
            record = self._names.get(source.name)
            if purpose.pinned or (record is not None and record.pinned):
                self._check_pin(record, purpose)

    def _install(self, ticket: LoadTicket, stored: StoredAdapter) -> None:
        record = self._names.setdefault(ticket.name, NameRecord(ticket.name, ticket.source))
        if record.current is None or record.current.version != stored.version:
            record.current = Entry(record, ticket.source, stored.version)
        record.source = ticket.source
        record.pinned = record.pinned or ticket.pinned
        _describe(record, stored)
        self._finish(ticket, None)
        self._free_unreachable()

    def _fill(self, entry: Entry, stored: StoredAdapter) -> None:
        entry.version, entry.reading = stored.version, False
        for _ in range(entry.refs):
            self._store.acquire(stored.version)
        if self._is_current(entry):
            _describe(entry.record, stored)

    def _fail(self, purpose: Entry | LoadTicket, error: SpecserveError) -> None:
        if isinstance(purpose, LoadTicket):
            self._finish(purpose, error)
            return
        purpose.error, purpose.reading = error, False
        if purpose.record.current is purpose:
            purpose.record.current = None  # so that the next request reads again

    def _finish(self, ticket: LoadTicket, error: SpecserveError | None) -> None:
        ticket.error, ticket.done = error, True
        self._loading.remove(ticket)
        self._finished.append(ticket)

    def _stuck(self) -> bool:
        """Whether requests hold host memory and none can go on: each waits for an adapter that is not read yet.

        Then nothing would ever be freed, and the next adapter is taken in beyond the budget.
        """
        return bool(self._live) and not any(
            all(use.entry.loaded or use.entry.error is not None for use in uses) for uses in self._live
        )

    # --- helpers -------------------------------------------------------------------------------------------------

    def _record(self, name: str, param: str = "name") -> NameRecord:
        record = self._names.get(name)
        if record is None:
            raise NotFoundError(f"The adapter {name!r} does not exist.", param=param)
        return record

    def _current(self, record: NameRecord) -> Entry:
        if record.current is None:
            record.current = Entry(record, record.source)
        return record.current

    def _is_current(self, entry: Entry) -> bool:
        return entry.record.current is entry and self._names.get(entry.record.name) is entry.record

    def _start_read(self, entry: Entry) -> None:
        if not (entry.loaded or entry.reading or entry.error):
            entry.reading = True
            self._reads.submit(Read(entry.source, entry))

    def _check_name(self, source: AdapterSource, replace: bool, version: str = "") -> None:
        record = self._names.get(source.name)
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

    def _check_slots(self, uses: Uses) -> None:
        """Raise unless the adapters of one request fit the slots beside the pinned ones."""
        entries = {use.entry for use in uses}
        if len(entries) > self._slots.num_slots:
            raise InvalidRequestError(
                f"lora: {len(entries)} adapters in one request; the device has {self._slots.num_slots} slots.",
                param="lora",
            )
        if len(entries | self._pins(None)) > self._slots.num_slots:
            raise AdapterBusyError(
                f"lora: pinned adapters leave too few of the {self._slots.num_slots} device slots; unpin some.",
                param="lora",
            )

    def _check_pin(self, record: NameRecord | None, pin: Entry | LoadTicket) -> None:
        """Raise unless every live request could still get its slots if `pin` became the pinned version of `record`."""
        pins = {*self._pins(record), pin}
        if any(len({*pins, *(use.entry for use in uses)}) > self._slots.num_slots for uses in (*self._live, ())):
            raise AdapterBusyError(
                f"Too few of the {self._slots.num_slots} device slots would be left for others; unpin another adapter.",
                param="pinned",
            )

    def _pins(self, without: NameRecord | None) -> set[object]:
        """What holds or will hold a slot by being pinned: the current entries, or names that have none."""
        return {rec.current or rec for rec in self._names.values() if rec.pinned and rec is not without}

    def _sync_pins(self) -> None:
        pinned = (record.current for record in self._names.values() if record.pinned)
        versions = frozenset(entry.version for entry in pinned if entry is not None and entry.loaded)
        self._store.pinned = self._slots.pinned = versions
        self._trim()

    def _trim(self) -> None:
        self._forget(self._store.trim())

    def _forget(self, evicted: Sequence[str]) -> None:
        """These versions left the host tier: free their warm slots; who needs them next reads them anew."""
        if not evicted:
            return
        for version in evicted:
            self._slots.forget(version)
        for record in self._names.values():
            if record.current is not None and record.current.version in evicted:
                record.current = None

    def _free_unreachable(self) -> None:
        """Free versions that no name means and no request has."""
        current = {record.current.version for record in self._names.values() if record.current is not None}
        for version in [version for version in self._store if version not in current and not self._store.refs(version)]:
            self._store.drop(version)
            self._slots.forget(version)

    def check_integrity(self) -> None:
        """References, slots and memory agree with the live requests; nothing unreachable is kept."""
        self._store.check_integrity()
        self._slots.check_integrity()
        live: Counter[Entry] = Counter()
        host: Counter[str] = Counter()
        for uses, count in self._live.items():
            for use in uses:
                live[use.entry] += count
                host[use.entry.version] += count
        current = {record.current for record in self._names.values() if record.current is not None}
        assert all(entry.refs == live[entry] for entry in live.keys() | current)
        assert all(entry.version in self._store for entry in live.keys() | current if entry.loaded)
        assert all(self._store.refs(version) == host[version] for version in self._store)
        placed: Counter[str] = Counter()
        for uses, count in self._placed.items():
            assert 0 < count <= self._live[uses]
            for version, _ in merge_uses(uses):
                placed[version] += count
        assert all(self._slots.uses(version) == placed[version] for version in self._store)
        assert set(self._slots) <= set(self._store)
        reachable = {entry.version for entry in current} | host.keys()
        assert set(self._store) <= reachable
        assert all(record.running >= 0 for record in self._names.values())


def _source(name: str, path: str | Path, draft_path: str | Path | None) -> AdapterSource:
    return AdapterSource(name, Path(path), Path(draft_path) if draft_path is not None else None)


def _describe(record: NameRecord, stored: StoredAdapter) -> None:
    record.version, record.rank, record.num_bytes = stored.version, stored.rank, stored.num_bytes
    record.has_draft = stored.draft is not None


def _decrement(counter: Counter[Uses], uses: Uses) -> None:
    assert counter[uses] > 0, "more releases than acquisitions"
    counter[uses] -= 1
    if not counter[uses]:
        del counter[uses]
