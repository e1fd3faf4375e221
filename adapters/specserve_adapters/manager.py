"""AdapterManager: names, versions and tiers of all adapters, for the engine and its scheduler.

One owner thread calls everything; only folders are read elsewhere (ReadQueue), and `poll()` brings the results in.

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

from specserve.core.errors import AdapterBusyError, AdapterError, InvalidRequestError, SpecserveError
from specserve.core.messages import AdapterInfo, LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.catalogue import Catalogue, adapter_info
from specserve_adapters.entry import (
    AdapterSource,
    AdapterUse,
    Entry,
    LoadTicket,
    NameRecord,
    Read,
    merge_uses,
    to_float32,
)
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.live import LiveUses, Uses
from specserve_adapters.reading import ReadQueue, ReadSettings, check_source, read_source
from specserve_adapters.spec import LinearSpec
from specserve_adapters.store import StoredAdapter
from specserve_adapters.tiers import Tiers

__all__ = ["AdapterManager", "AdapterUse", "LoadTicket"]

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
        self._tiers = Tiers(num_slots, max_host_bytes)
        self._names = Catalogue()
        self._live = LiveUses()
        self._reads: ReadQueue[Read] = ReadQueue(lambda read: read_source(read.source, self._settings))
        self._loading: list[LoadTicket] = []
        self._finished: list[LoadTicket] = []
        self._clock = clock

    # --- names ---------------------------------------------------------------------------------------------------

    def register(
        self, name: str, path: str | Path, draft_path: str | Path | None = None, *, weight: float = 1.0
    ) -> None:
        """Make `name` known; its folder is looked at, and read when a request first needs it.

        Raises AdapterError: a file is missing, or the name stands for another folder.
        """
        source = _source(name, path, draft_path)
        check_source(source, self._settings)
        self._names.check(source, replace=False)
        self._names.add(source).weight = weight

    def load(
        self,
        name: str,
        path: str | Path,
        *,
        draft_path: str | Path | None = None,
        pinned: bool = False,
        replace: bool = False,
        weight: float = 1.0,
    ) -> LoadTicket:
        """Begin to read a folder; `name` means it from the poll() on that returns the ticket without an error.

        Until then, and if it fails, the name means what it did. Contents that are loaded already change nothing. Raises
        AdapterError when the name stands for another folder and `replace` is false, AdapterBusyError when `pinned` and
        no slot can be pinned; the same may come as the ticket's error if it became true meanwhile.
        """
        ticket = LoadTicket(name, _source(name, path, draft_path), pinned, replace, weight)
        self._names.check(ticket.source, replace)
        if pinned:
            self._check_pin(self._names.find(name), ticket)
        self._loading.append(ticket)
        self._reads.submit(Read(ticket.source, ticket))
        return ticket

    def unload(self, name: str) -> None:
        """Forget `name` and end its loads under way. Requests that have it finish; then its memory is freed.

        Raises NotFoundError, and AdapterBusyError while it is pinned.
        """
        record = self._names.get(name)
        if record.pinned:
            raise AdapterBusyError(f"Adapter {name!r} is pinned; unpin it before unloading it.", param="name")
        self._names.remove(record)
        for ticket in [ticket for ticket in self._loading if ticket.name == name]:
            self._finish(ticket, AdapterBusyError(f"Adapter {name!r} was unloaded while it was loading.", param="name"))
        self._tiers.keep_only(self._names.versions())

    def pin(self, name: str, pinned: bool) -> None:
        """Pin: it is read if need be, stays in host memory, and keeps its device slot from its first use on.

        Raises NotFoundError, and AdapterBusyError when requests would have too few slots left.
        """
        record = self._names.get(name)
        if pinned and not record.pinned:
            entry = self._names.current(record)
            self._check_pin(record, entry)
            self._start_read(entry)
        record.pinned = pinned
        self._sync_pins()

    def info(self, name: str) -> AdapterInfo:
        """One adapter's state. Raises NotFoundError."""
        return self._info(self._names.get(name))

    def list(self) -> AdapterInfos:
        """All registered adapters, in the order of their registration."""
        return [self._info(record) for record in self._names]

    # --- requests ------------------------------------------------------------------------------------------------

    def acquire(self, refs: tuple[LoraRef, ...]) -> Uses:
        """A request arrives: its adapters' current entries, referenced until `release`.

        Raises NotFoundError, InvalidRequestError (scale out of float32's range, more adapters than slots),
        AdapterBusyError (pinned adapters leave too few slots for it).
        """
        records = [self._names.get(ref.name, param="lora") for ref in refs]
        scales = [to_float32(ref.scale) for ref in refs]
        to_float32(sum(abs(scale) for scale in scales))  # whatever is summed later stays in range
        uses = tuple(
            AdapterUse(self._names.current(record), scale) for record, scale in zip(records, scales, strict=True)
        )
        self._check_slots(uses)
        self._live.acquire(uses)
        for use in uses:
            if use.entry.loaded:
                self._tiers.store.acquire(use.entry.version)
        for record in set(records):
            record.requests += 1
            record.last_used = self._clock()
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
        if not self._tiers.slots.can_take([version for version, _ in merged]):
            return None
        pairs: list[tuple[int, float]] = []
        loads: list[AdapterLoad] = []
        for version, scale in merged:
            taken = self._tiers.slots.take(version)
            assert taken is not None
            slot, needs_load = taken
            pairs.append((slot, scale))
            if needs_load:
                loads.append(AdapterLoad(slot, version))
        self._live.place(uses)
        return tuple(pairs), loads

    def release_slots(self, uses: Uses) -> None:
        """The request left its device row (finished, aborted, preempted); the slots stay warm."""
        self._live.unplace(uses)
        for version, _ in merge_uses(uses):
            self._tiers.slots.release(version)

    def release(self, uses: Uses) -> None:
        """The request is gone, after `release_slots` if it had slots."""
        self._live.release(uses)
        for use in uses:
            use.entry.record.last_used = self._clock()
            if use.entry.loaded:
                self._tiers.store.release(use.entry.version)
        if not all(self._names.is_current(use.entry) for use in uses):
            self._tiers.keep_only(self._names.versions())
        self._names.forget(self._tiers.trim())

    def cache_key(self, uses: Uses) -> AdapterKey:
        """What the adapters add to the identity of cached KV: sorted (version, float32 scale); [] for the base model.

        Only of prepared uses: before, the version may not be known.
        """
        return merge_uses(uses)

    def weight_of(self, uses: Uses) -> float:
        """The share of tokens that requests with these adapters get beside others: the smallest of theirs."""
        return min((use.entry.record.weight for use in uses), default=1.0)

    def host(self, version: str) -> tuple[HostAdapter, HostAdapter | None]:
        """Target LoRA and companion of a version that an AdapterLoad names."""
        stored = self._tiers.store.get(version)
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
        elif not purpose.refs and not self._names.is_current(purpose):
            return True
        try:
            if isinstance(result, AdapterError):
                raise result
            self._check_admission(purpose, result)
        except SpecserveError as error:
            self._fail(purpose, error)
            return True
        evicted = self._tiers.put(result, force=self._live.stuck())
        if evicted is None:
            return False
        self._names.forget(evicted)
        if isinstance(purpose, LoadTicket):
            self._install(purpose, result)
        else:
            self._fill(purpose, result)
        self._sync_pins()
        return True

    def _check_admission(self, purpose: Entry | LoadTicket, stored: StoredAdapter) -> None:
        source = purpose.source
        if stored.version not in self._tiers.store and not self._tiers.store.can_ever_fit(stored):
            raise AdapterError(
                f"Adapter {source.name!r} needs {stored.num_bytes} bytes of host memory; adapters may take "
                f"{self._tiers.store.max_bytes}, pinned ones included. Unpin adapters or allow more.",
                param="path",
            )
        if isinstance(purpose, LoadTicket):
            self._names.check(source, purpose.replace, stored.version)
            record = self._names.find(source.name)
            if purpose.pinned or (record is not None and record.pinned):
                self._check_pin(record, purpose)

    def _install(self, ticket: LoadTicket, stored: StoredAdapter) -> None:
        record = self._names.add(ticket.source)
        if record.current is None or record.current.version != stored.version:
            record.current = Entry(record, ticket.source, stored.version)
        record.source = ticket.source
        record.pinned = record.pinned or ticket.pinned
        record.weight = ticket.weight
        _describe(record, stored)
        self._finish(ticket, None)
        self._tiers.keep_only(self._names.versions())

    def _fill(self, entry: Entry, stored: StoredAdapter) -> None:
        entry.version, entry.reading = stored.version, False
        for _ in range(entry.refs):
            self._tiers.store.acquire(stored.version)
        if self._names.is_current(entry):
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

    # --- helpers -------------------------------------------------------------------------------------------------

    def _info(self, record: NameRecord) -> AdapterInfo:
        slot = self._tiers.slots.slot_of(record.current.version) if record.current is not None else None
        return adapter_info(record, slot)

    def _start_read(self, entry: Entry) -> None:
        if not (entry.loaded or entry.reading or entry.error):
            entry.reading = True
            self._reads.submit(Read(entry.source, entry))

    def _check_slots(self, uses: Uses) -> None:
        """Raise unless the adapters of one request fit the slots beside the pinned ones."""
        num_slots = self._tiers.slots.num_slots
        entries = {use.entry for use in uses}
        if len(entries) > num_slots:
            raise InvalidRequestError(
                f"lora: {len(entries)} adapters in one request; the device has {num_slots} slots.", param="lora"
            )
        if entries and len(self._names.pins() | entries) > num_slots:
            raise AdapterBusyError(
                f"lora: pinned adapters leave too few of the {num_slots} device slots; unpin some.", param="lora"
            )

    def _check_pin(self, record: NameRecord | None, pin: Entry | LoadTicket) -> None:
        """Raise unless every live request could still get its slots if `pin` became the pinned version of `record`."""
        num_slots = self._tiers.slots.num_slots
        if not self._live.fit(num_slots, self._names.pins(without=record) | {pin}):
            raise AdapterBusyError(
                f"Too few of the {num_slots} device slots would be left for others; unpin another adapter.",
                param="pinned",
            )

    def _sync_pins(self) -> None:
        self._tiers.pin(self._names.versions(pinned=True))
        self._names.forget(self._tiers.trim())

    def check_integrity(self) -> None:
        """References, slots and memory agree with the live requests; nothing unreachable is kept."""
        self._tiers.check_integrity()
        store, slots = self._tiers.store, self._tiers.slots
        live = self._live.references()
        current = {record.current for record in self._names if record.current is not None}
        in_host: Counter[str] = Counter()
        for entry in live.keys() | current:
            assert entry.refs == live[entry]
            assert not entry.loaded or entry.version in store
            in_host[entry.version] += entry.refs
        assert all(store.refs(version) == in_host[version] for version in store)
        assert set(store) <= in_host.keys(), "nobody can reach it, but it is kept"
        placed = self._live.slot_uses()
        assert all(slots.uses(version) == placed[version] for version in store)
        assert store.pinned == slots.pinned == self._names.versions(pinned=True)


def _source(name: str, path: str | Path, draft_path: str | Path | None) -> AdapterSource:
    return AdapterSource(name, Path(path), Path(draft_path) if draft_path is not None else None)


def _describe(record: NameRecord, stored: StoredAdapter) -> None:
    record.version, record.rank, record.num_bytes = stored.version, stored.rank, stored.num_bytes
    record.has_draft = stored.draft is not None
