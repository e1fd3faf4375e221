"""Measure variants in turn on the same requests, and keep what there is whichever way it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from specserve.bench.deadline import Deadline
from specserve.bench.fleet import Fleet
from specserve.bench.kept import Kept
from specserve.bench.plan import AbOptions, Plan
from specserve.bench.records import Comparison, Load, RequestRecord, RunRecord, TracedRequest
from specserve.bench.servers import RunningServer, ServerFailedError
from specserve.bench.turns import Turn, in_blocks, interleaved
from specserve.bench.variants import Variant

WATCH_SECONDS = 0.2
TOGETHER = "interleaved: all servers resident, those not measured sent nothing"
APART = "in blocks: one server at a time, with restarts"


class Sender(Protocol):
    """What sends requests (`Sending` does)."""

    async def facts(self, server: RunningServer) -> dict[str, Any]:
        """What the server tells of itself."""

    async def run(
        self, server: RunningServer, trace: Sequence[TracedRequest], load: Load, ended: Callable[[RequestRecord], None]
    ) -> float:
        """Send a trace; `ended` gets each request's record at its end. Returns how many seconds it took in all."""


class Watcher(Protocol):
    """Whoever shows how far it is."""

    def told(self, line: str) -> None: ...

    def planned(self, turns: Sequence[Turn], requests: int) -> None: ...

    def began(self, turn: Turn) -> None: ...

    def request_ended(self) -> None: ...


class Outcome(msgspec.Struct, frozen=True):
    """What was measured. `stopped`: why before its end, for a person; None: all of it was."""

    comparison: Comparison
    stopped: str | None = None
    interrupted: bool = False


async def compare(
    variants: Sequence[Variant],
    options: AbOptions,
    plan: Plan,
    sender: Sender,
    watcher: Watcher,
    *,
    folder: Path,
    facts: dict[str, Any],
) -> Outcome:
    """Run the comparison; logs and finished runs go to `folder`.

    A server that dies, a cancellation (Ctrl-C) or a server that does not start end it early: the outcome then holds
    what was measured by then. All servers are gone when this returns.
    """
    kept = Kept(variants, folder, facts)
    fleet = Fleet(variants, folder / "logs", start_timeout=options.start_timeout, told=watcher.told)
    try:
        async with fleet:
            await _all_turns(fleet, options, plan, sender, watcher, kept, Deadline(options.minutes))
    except ServerFailedError as failure:
        return _stopped(kept, str(failure).rstrip("."))
    except asyncio.CancelledError:
        return msgspec.structs.replace(_stopped(kept, "it was interrupted"), interrupted=True)
    return Outcome(kept.comparison())


def _stopped(kept: Kept, why: str) -> Outcome:
    kept.note(f"The comparison did not finish: {why}.")
    return Outcome(kept.comparison(), why)


async def _all_turns(
    fleet: Fleet, options: AbOptions, plan: Plan, sender: Sender, watcher: Watcher, kept: Kept, deadline: Deadline
) -> None:
    apart: str | None = "it was asked for" if options.one_at_a_time else None
    if apart is None:
        failure = await fleet.start_together()
        if failure is not None:
            apart = f"they do not fit together: {failure}"
            watcher.told(f"One server at a time, since {apart}")
    kept.fact("turns", TOGETHER if apart is None else f"{APART} ({apart})")
    if apart is not None:
        kept.note(f"Servers were measured in blocks, one at a time with restarts, since {apart}.")
    order = interleaved if apart is None else in_blocks
    turns = order(list(fleet.variants), plan.loads, plan.rounds)
    watcher.planned(turns, sum(len(plan.requests(turn)) for turn in turns))

    async def resident(name: str) -> RunningServer:
        return fleet.running(name)

    server_of: Callable[[str], Awaitable[RunningServer]] = resident if apart is None else fleet.alone
    for turn in turns:
        if apart is None and not deadline.allows(turn):
            kept.note(f"{turn.round} of {plan.rounds} rounds measured: --minutes {options.minutes} left no more time.")
            return
        server = await server_of(turn.variant)
        if not kept.known(turn.variant):
            told = await sender.facts(server)
            kept.tell(turn.variant, command=server.command, url=server.url, server=told)
        watcher.began(turn)
        await _one_turn(server, turn, plan.requests(turn), sender, watcher, kept)


async def _one_turn(
    server: RunningServer, turn: Turn, trace: Sequence[TracedRequest], sender: Sender, watcher: Watcher, kept: Kept
) -> None:
    """One run. Whatever ends it early, its finished requests are kept."""
    records: list[RequestRecord] = []

    def ended(record: RequestRecord) -> None:
        records.append(record)
        watcher.request_ended()

    begin, duration = asyncio.get_running_loop().time(), None
    try:
        duration = await _while_alive(server, sender.run(server, trace, turn.load, ended))
        _check_answered(server, records, len(trace))
    finally:
        if records and not turn.warm_up:
            spent = asyncio.get_running_loop().time() - begin
            whole = duration is not None and len(records) == len(trace)
            ordered = sorted(records, key=lambda record: record.index)
            seconds = spent if duration is None else duration
            kept.add(RunRecord(turn.variant, turn.round, turn.load, seconds, ordered, complete=whole))


async def _while_alive(server: RunningServer, run: Awaitable[float]) -> float:
    """The run's duration; raises ServerFailedError as soon as the server's process has ended."""
    task = asyncio.ensure_future(run)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=WATCH_SECONDS)
            server.check_alive()
            if done:
                return task.result()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def _check_answered(server: RunningServer, records: Sequence[RequestRecord], sent: int) -> None:
    """A server that answers nothing is as good as dead, and going on would only fill a report with errors."""
    failed = [record.error for record in records if record.error is not None]
    name = f"{server.variant.name} ({server.variant.title})"
    if len(records) < sent:
        last = f": {failed[-1]}" if failed else ""
        raise ServerFailedError(server.variant.name, f"{name} takes no connections any more{last}")
    if len(failed) == sent:
        raise ServerFailedError(server.variant.name, f"{name} failed every request of a run: {failed[0]}")
