"""What is read from disk and how it comes in: reads for requests that wait, and loads that were asked for."""

from __future__ import annotations

from collections.abc import Callable

from specserve.core.errors import AdapterBusyError, AdapterError, SpecserveError
from specserve_adapters.entry import AdapterSource, Entry, LoadTicket, NameRecord, Read
from specserve_adapters.library import Library
from specserve_adapters.live import LiveUses
from specserve_adapters.reading import ReadQueue
from specserve_adapters.room import check_pin, pin_name
from specserve_adapters.store import StoredAdapter


class Intake:
    """Reads under way and their ends. `read` runs on threads of its own, everything else on the owner's."""

    def __init__(self, library: Library, live: LiveUses, read: Callable[[AdapterSource], StoredAdapter]) -> None:
        self._library = library
        self._names = library.names
        self._live = live
        self.queue: ReadQueue[Read] = ReadQueue(
            lambda job: read(job.source), self._wanted, name=lambda job: job.source.name
        )
        self._loading: list[LoadTicket] = []
        self._finished: list[LoadTicket] = []
        self._no_room: tuple[Read, ...] = ()  # finished reads; the last of them has found no room

    def load(self, ticket: LoadTicket) -> None:
        """Begin a load that was asked for."""
        self._loading.append(ticket)
        self.queue.submit(Read(ticket.source, ticket))

    def start(self, entry: Entry) -> None:
        """Begin the read of an entry, unless it is loaded, being read, or failed."""
        if not (entry.loaded or entry.reading or entry.error):
            entry.reading = True
            self._names.touch(entry.record)
            self.queue.submit(Read(entry.source, entry))

    def cancel(self, name: str) -> None:
        """End the loads of an unloaded name."""
        for ticket in [ticket for ticket in self._loading if ticket.name == name]:
            self._finish(ticket, AdapterBusyError(f"Adapter {name!r} was unloaded while it was loading.", param="name"))

    def room_made(self) -> None:
        """Something was freed, or nobody is left who would free something: try again what found no room."""
        self._no_room = ()

    def poll(self) -> list[LoadTicket]:
        """Take in what was read: loads that ended since the last poll. Never blocks. What finds no room waits for it,
        and so does what was submitted after it."""
        reads = self.queue.finished()
        if reads and tuple(job for job, _ in reads) != self._no_room:
            for place, (job, result) in enumerate(reads):
                if not self._settle(job.purpose, result):
                    self._no_room = tuple(job for job, _ in reads[place:])
                    break
                self.queue.pop(job)
        finished, self._finished = self._finished, []
        return finished

    def _wanted(self, job: Read) -> bool:
        purpose = job.purpose
        if isinstance(purpose, LoadTicket):
            return not purpose.done
        wanted = purpose.refs > 0 or (purpose.record.pinned and self._names.is_current(purpose))
        if purpose.reading != wanted:
            purpose.reading = wanted
            self._names.touch(purpose.record)
        return wanted

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
        if not self._library.put(result, force=self._live.stuck()):
            return False
        if isinstance(purpose, LoadTicket):
            self._install(purpose, result)
        else:
            self._fill(purpose, result)
        self._library.sync_pins()
        return True

    def _check_admission(self, purpose: Entry | LoadTicket, stored: StoredAdapter) -> None:
        source, store = purpose.source, self._library.tiers.store
        if stored.version not in store and not store.can_ever_fit(stored):
            raise AdapterError(
                f"Adapter {source.name!r} needs {stored.num_bytes} bytes of host memory; adapters may take "
                f"{store.max_bytes}, pinned ones included: unpin others, or start with a larger --max-host-lora-bytes.",
                param="path",
            )
        if isinstance(purpose, LoadTicket):
            self._names.check(source, purpose.replace, stored.version)
            record = self._names.find(source.name)
            if purpose.pinned or (record is not None and record.pinned):
                check_pin(record, purpose, self._names, self._live, self._library.tiers.slots.num_slots)

    def _install(self, ticket: LoadTicket, stored: StoredAdapter) -> None:
        record = self._names.add(ticket.source)
        old = record.current.version if record.current is not None else ""
        if old != stored.version:
            self._names.set_current(record, Entry(record, ticket.source, stored.version))
        record.source, record.weight = ticket.source, ticket.weight
        if ticket.pinned:
            pin_name(record, self._names, self._library.tiers.slots.num_slots)
        _describe(record, stored)
        self._finish(ticket, None)
        self._library.reclaim(old)

    def _fill(self, entry: Entry, stored: StoredAdapter) -> None:
        entry.reading = False
        self._names.fill(entry, stored.version)
        for _ in range(entry.refs):
            self._library.tiers.store.acquire(stored.version)
        if self._names.is_current(entry):
            _describe(entry.record, stored)

    def _fail(self, purpose: Entry | LoadTicket, error: SpecserveError) -> None:
        if isinstance(purpose, LoadTicket):
            self._finish(purpose, error)
            return
        purpose.error, purpose.reading = error, False
        self._names.touch(purpose.record)
        if purpose.record.current is purpose:
            purpose.record.current = None  # so that the next request reads again

    def _finish(self, ticket: LoadTicket, error: SpecserveError | None) -> None:
        ticket.error, ticket.done = error, True
        self._loading.remove(ticket)
        self._finished.append(ticket)


def _describe(record: NameRecord, stored: StoredAdapter) -> None:
    record.version, record.rank, record.num_bytes = stored.version, stored.rank, stored.num_bytes
    record.has_draft = stored.draft is not None
