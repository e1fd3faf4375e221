"""Load: the requests of a trace sent at their times, and what came of each."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from specserve.bench.records import Load, RequestRecord, RunRecord, TracedRequest

GRACE_SECONDS = 1.0  # in which requests fail by themselves once their server is gone


class Sender(Protocol):
    """What load needs of a client (`Client` is one)."""

    async def send(self, request: TracedRequest, start: float) -> RequestRecord: ...

    async def alive(self) -> bool: ...


def _ignore(record: RequestRecord) -> None:
    pass


async def run_load(
    client: Sender,
    trace: Sequence[TracedRequest],
    *,
    max_concurrency: int | None = None,
    load: Load | None = None,
    variant: str = "A",
    round_: int = 0,
    on_end: Callable[[RequestRecord], None] = _ignore,
    stop: asyncio.Event | None = None,
) -> RunRecord:
    """Send each request at its arrival, `max_concurrency` at most at a time (others wait their turn), and wait for all.

    A request that fails is recorded with its error, and the others go on; but once the server takes no connections any
    more, or `stop` is set, no further one is sent, and the record says that it is not complete. `on_end` sees each
    record as it comes.
    """
    run = _Run(client, max_concurrency, on_end, stop or asyncio.Event())
    try:
        await run.send_all(trace)
    finally:
        await run.end()
    records = sorted(run.records, key=lambda record: record.index)
    first, last = min((r.sent for r in records), default=0.0), max((r.end for r in records), default=0.0)
    return RunRecord(variant, round_, load or {}, last - first, records, complete=len(records) == len(trace))


class _Run:
    def __init__(
        self, client: Sender, max_concurrency: int | None, on_end: Callable[[RequestRecord], None], stop: asyncio.Event
    ) -> None:
        self.records: list[RequestRecord] = []
        self._client, self._on_end, self._stop = client, on_end, stop
        self._room = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
        self._tasks: list[asyncio.Task[None]] = []
        self._server_gone = False
        self._start = time.perf_counter()

    async def send_all(self, trace: Sequence[TracedRequest]) -> None:
        """Return when all have ended, or soon after the run was stopped."""
        for request in trace:
            await self._until(request.arrival)
            if self._stop.is_set():
                return
            self._tasks.append(asyncio.create_task(self._one(request)))
        stopped, everything = asyncio.create_task(self._stop.wait()), asyncio.gather(*self._tasks)
        either: set[asyncio.Future[Any]] = {stopped, everything}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            # Cut short, its tasks are cancelled later, and nobody asks then how it ended.
            everything.add_done_callback(lambda done: done.cancelled() or done.exception())
        if everything.done():
            everything.result()  # raises what no record can tell: an error of ours

    async def end(self) -> None:
        """Whatever still runs is given up, after a moment in which it may fail by itself."""
        running = [task for task in self._tasks if not task.done()]
        if running and self._server_gone:
            await asyncio.wait(running, timeout=GRACE_SECONDS)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, request: TracedRequest) -> None:
        if self._room is None:
            return await self._send(request)
        async with self._room:
            if not self._stop.is_set():
                await self._send(request)

    async def _send(self, request: TracedRequest) -> None:
        record = await self._client.send(request, self._start)
        self.records.append(record)
        self._on_end(record)
        if record.error is not None and not self._stop.is_set() and not await self._client.alive():
            self._server_gone = True
            self._stop.set()

    async def _until(self, arrival: float) -> None:
        """Sleep until the time has come or the run is stopped."""
        left = self._start + arrival - time.perf_counter()
        if left > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), left)
