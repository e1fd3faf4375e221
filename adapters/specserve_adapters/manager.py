"""AdapterManager: names, versions and tiers of all adapters, for the engine and its scheduler.

One owner thread calls everything; only folders are read elsewhere (ReadQueue), and `poll()` brings the results in.

Versions: a name has a current entry. A request gets the entry that is current when it is acquired and keeps it. If
that entry is not in host memory, its version is decided by the read that the request waits for: it gets what the
folder holds at that moment, whatever was read from it before. An entry evicted from the host tier (no request has it
then) is forgotten; the next request gets a new one, read anew. A reload puts a new entry in place at once, in poll().
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from specserve.core.errors import AdapterBusyError, AdapterError
from specserve.core.messages import AdapterInfo, AdapterTierStats, LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.entry import AdapterSource, AdapterUse, LoadTicket, merge_uses, to_float32
from specserve_adapters.helpers import make_helpers
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.intake import Intake
from specserve_adapters.library import Library
from specserve_adapters.live import LiveUses, Uses
from specserve_adapters.placements import Placement, Placements
from specserve_adapters.reading import ReadSettings, check_source, read_source
from specserve_adapters.room import check_pin, check_request
from specserve_adapters.spec import LinearSpec

__all__ = ["AdapterManager", "AdapterUse", "LoadTicket"]

READ_HELPERS = min(4, os.cpu_count() or 1)  # threads that share the work on one adapter
# `list` is a method of the class, so its signatures cannot name the type.
AdapterInfos = list[AdapterInfo]
Changes = tuple[list[AdapterInfo], list[str]]
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
        helpers = make_helpers(READ_HELPERS)
        largest = _largest_bytes(target_specs, max_rank, dtype) + _largest_bytes(
            draft_specs or (), max_rank, draft_dtype
        )
        pin = pin_memory and num_slots > 0 and max_host_bytes > 0
        memory = HostMemory(max_host_bytes, pin=pin, largest=largest)
        self._settings = settings = ReadSettings(
            target_specs, draft_specs, max_rank, max_host_bytes, dtype, draft_dtype, memory, helpers
        )
        self._library = Library(num_slots, max_host_bytes)
        self._names, self._tiers = self._library.names, self._library.tiers
        self._live = LiveUses()
        self._intake = Intake(self._library, self._live, lambda source: read_source(source, settings))
        self._placements = Placements(self._library, self._live)
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
            check_pin(self._names.find(name), ticket, self._names, self._live, self._tiers.slots.num_slots)
        self._intake.load(ticket)
        return ticket

    def unload(self, name: str) -> None:
        """Forget `name` and end its loads under way. Requests that have it finish; then its memory is freed.

        Raises NotFoundError, and AdapterBusyError while it is pinned.
        """
        record = self._names.get(name)
        if record.pinned:
            raise AdapterBusyError(f"Adapter {name!r} is pinned; unpin it before unloading it.", param="name")
        self._names.remove(record)
        self._intake.cancel(name)
        if record.current is not None:
            self._library.reclaim(record.current.version)
        self._intake.room_made()

    def pin(self, name: str, pinned: bool) -> None:
        """Pin: it is read if need be, stays in host memory, and keeps its device slot from its first use on.

        Raises NotFoundError, and AdapterBusyError when requests would have too few slots left.
        """
        record = self._names.get(name)
        entry = self._names.current(record)
        if pinned and not record.pinned:
            check_pin(record, entry, self._names, self._live, self._tiers.slots.num_slots)
        self._library.pin(record, pinned)
        if pinned:
            self._intake.start(entry)
        self._intake.room_made()

    def info(self, name: str) -> AdapterInfo:
        """One adapter's state. Raises NotFoundError."""
        return self._library.info(self._names.get(name))

    def list(self) -> AdapterInfos:
        """All registered adapters, in the order of their registration."""
        return [self._library.info(record) for record in self._names]

    def changed(self) -> Changes:
        """What changed since the last call: infos as they are now, and names that are gone. At first, everything."""
        return self._library.changed()

    def stats(self) -> AdapterTierStats:
        """The tiers as a whole."""
        tiers, queue = self._tiers, self._intake.queue
        return AdapterTierStats(
            host_bytes=tiers.store.num_bytes,
            max_host_bytes=tiers.store.max_bytes,
            slots=tiers.slots.num_slots,
            slots_used=len(tiers.slots),
            reads=queue.reads,
            read_seconds=queue.seconds,
            loads=self._placements.loads,
            load_seconds=self._placements.load_seconds,
            evictions_host=tiers.evictions_host,
            evictions_device=tiers.evictions_device,
        )

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
        check_request(uses, self._names, self._tiers.slots.num_slots)
        self._live.acquire(uses)
        for use in uses:
            if use.entry.loaded:
                self._tiers.store.acquire(use.entry.version)
        for record in set(records):
            record.requests += 1
            record.last_used = self._clock()
            self._names.touch(record)
        return uses

    def prepare(self, uses: Uses) -> bool:
        """True: all in host memory. False: they are being read; ask again after a poll(). The first call starts the
        reads, so that whoever waits is best prepared at once.

        Raises AdapterError when a read failed, for every request that waited for it; later requests read anew.
        """
        for use in uses:
            if use.entry.error is not None:
                raise AdapterError(use.entry.error.message, param="lora")
        for use in uses:
            self._intake.start(use.entry)
        return all(use.entry.loaded for use in uses)

    def take_slots(self, uses: Uses) -> Placement | None:
        """A prepared request takes its slots: their (slot, weight) pairs and what must be loaded into them first.

        The loads are to begin in this order; a slot may be read once `slots_live` says so. None: no slot can be freed
        now; nothing was taken.
        """
        return self._placements.take(uses)

    def slots_live(self, uses: Uses) -> bool:
        """Whether the slots that this request took hold its adapters: no load of theirs is under way."""
        return self._placements.are_live(uses)

    def loaded(self, load: AdapterLoad) -> None:
        """The oldest load under way ended, whatever its slot stands for by now."""
        self._placements.loaded(load)

    @property
    def num_loading(self) -> int:
        """Loads that have not ended."""
        return self._placements.num_loading

    def release_slots(self, uses: Uses) -> None:
        """The request gives its slots back (finished, aborted, preempted), loaded or not; they stay warm."""
        self._placements.release(uses)

    def release(self, uses: Uses) -> None:
        """The request is gone, after `release_slots` if it had slots."""
        if not uses:
            return
        self._live.release(uses)
        for use in uses:
            use.entry.record.last_used = self._clock()
            self._names.touch(use.entry.record)
            if use.entry.loaded:
                self._tiers.store.release(use.entry.version)
        for use in uses:
            self._library.reclaim(use.entry.version)
        self._library.trim()
        self._intake.room_made()

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
            self._names.touch(record)

    # --- reads ---------------------------------------------------------------------------------------------------

    def poll(self) -> LoadTickets:
        """Take in what was read: loads that ended since the last poll, well or badly. Never blocks."""
        return self._intake.poll()

    @property
    def num_reading(self) -> int:
        """Reads that are queued, under way or waiting for room."""
        return len(self._intake.queue)

    def wait(self, timeout: float) -> bool:
        """Block until the reads under way end, at most `timeout` seconds: for an engine with nothing else to do. False
        if there are none; one that ended may still wait for room."""
        return self._intake.queue.wait(timeout)

    def close(self) -> None:
        """End the reading threads."""
        self._intake.queue.close(then=lambda: self._settings.helpers.shutdown(wait=False))

    # --- helpers -------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """References, slots and memory agree with the live requests; nothing unreachable is kept."""
        self._library.check_integrity()
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
        assert slots.num_loading == self.num_loading


def _source(name: str, path: str | Path, draft_path: str | Path | None) -> AdapterSource:
    return AdapterSource(name, Path(path), Path(draft_path) if draft_path is not None else None)


def _largest_bytes(specs: Sequence[LinearSpec], max_rank: int, dtype: torch.dtype) -> int:
    """Of an adapter that has the largest rank everywhere."""
    return sum(spec.in_features * len(spec.parts) + spec.out_features for spec in specs) * max_rank * dtype.itemsize
