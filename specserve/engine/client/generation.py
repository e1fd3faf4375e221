"""One generate call on its way: its sequences (one a prompt and sample), what each step brought, what it cost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from types import TracebackType

from specserve.core.errors import SpecserveError
from specserve.core.messages import SpeculationStats
from specserve.engine.client.sequence import Delta, Sequence, join_deltas


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """All that continues an interrupted sequence: exactly where it is greedy or its request carried a seed."""

    index: int
    prompt_ids: list[int]
    output_ids: list[int]
    seed: int


@dataclass(slots=True)
class Usage:
    """Token counts of a whole call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    speculation: SpeculationStats


class Generation:
    """An async iterator of Deltas, and a context manager: leaving it early aborts what still runs.

    Iteration raises the SpecserveError of the first sequence that failed; EngineDeadError leaves `resume_points`.

    `queued` holds what has come and was not taken. `listener`, if there is one, is called in the reader's own turn,
    when all that was to be read has been put there; it may take from `queued`, as long as it leaves errors and whatever
    ends a sequence to the iteration.
    """

    def __init__(self, sequences: list[Sequence], abort: Callable[[list[Sequence]], None]) -> None:
        self.sequences = sequences
        self._abort = abort
        self.queued: deque[Delta | SpecserveError] = deque()
        self.listener: Callable[[], None] | None = None
        self._num_open = len(sequences)
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Delta | SpecserveError) -> None:
        """Called by the engine's reader, never by users; `wake` follows."""
        self.queued.append(item)

    def wake(self) -> None:
        """Called by the engine's reader when nothing more is to be put now."""
        if self.listener is not None:
            self.listener()
        if self.queued and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take_all(self) -> Collection[Delta]:
        """Everything that waits, once there is something, of each sequence joined into one; [] at the end."""
        first = await anext(self, None)
        taken = [] if first is None else [first]
        while self.queued and isinstance(self.queued[0], Delta):
            taken.append(self._take(self.queued[0]))
        return join_deltas(taken)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._num_open == 0:
            raise StopAsyncIteration
        while not self.queued:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self.queued[0]
        if isinstance(item, SpecserveError):
            self._num_open = 0
            raise item
        return self._take(item)

    def _take(self, item: Delta) -> Delta:
        """The first of what is queued."""
        self.queued.popleft()
        self._num_open -= item.finish_reason is not None
        return item

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abort([sequence for sequence in self.sequences if sequence.finish_reason is None])

    @property
    def resume_points(self) -> list[ResumePoint]:
        """Where each unfinished sequence stands."""
        return [
            ResumePoint(seq.index, seq.request.prompt_ids, list(seq.output_ids), seq.request.seed)
            for seq in self.sequences
            if seq.finish_reason in (None, "error")
        ]

    @property
    def usage(self) -> Usage:
        """Counts so far. A prompt counts once however many samples it has; resumed output counts as neither."""
        prompts = {seq.prompt: seq for seq in reversed(self.sequences)}
        total = SpeculationStats()
        for seq in self.sequences:
            if seq.speculation is not None:
                _add(total, seq.speculation)
        return Usage(
            prompt_tokens=sum(len(seq.request.prompt_ids) for seq in prompts.values()),
            completion_tokens=sum(seq.num_new_tokens for seq in self.sequences),
            cached_tokens=sum(seq.cached_tokens for seq in prompts.values()),
            speculation=total,
        )


def _add(total: SpeculationStats, part: SpeculationStats) -> None:
    total.rounds += part.rounds
    total.drafted += part.drafted
    total.accepted += part.accepted
    for counts, new in (
        (total.drafted_per_position, part.drafted_per_position),
        (total.accepted_per_position, part.accepted_per_position),
    ):
        counts.extend([0] * (len(new) - len(counts)))
        for index, count in enumerate(new):
            counts[index] += count
