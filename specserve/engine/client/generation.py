"""One generate call on its way: its sequences (one a prompt and sample), what each step brought, what it cost."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from types import TracebackType

from specserve.core.errors import InvalidRequestError, SpecserveError
from specserve.core.messages import (
    AddRequest,
    FinishReason,
    RequestOutput,
    SpeculationStats,
    TokenLogprobs,
)
from specserve.engine.client.detokenizer import Detokenizer
from specserve.engine.client.tokenizer import Decoder


@dataclass(slots=True)
class Delta:
    """What one step gave one sequence. `index` numbers the sequences: prompt × n + sample.

    `token_ids`, `logprobs` and `offsets` (characters into this response's text, where there are logprobs) run in
    parallel; `text` may lag behind them while a character or a stop string is unfinished.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    offsets: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it


def join_deltas(deltas: Collection[Delta]) -> Collection[Delta]:
    """Of each sequence one Delta that says what its several said, in the order of their first ones."""
    if len(deltas) == 1:
        return deltas
    parts: dict[int, list[Delta]] = {}
    for delta in deltas:
        parts.setdefault(delta.index, []).append(delta)
    return [_join(each) for each in parts.values()]


def _join(parts: list[Delta]) -> Delta:
    if len(parts) == 1:
        return parts[0]
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    return dataclasses.replace(
        parts[-1],
        text="".join([part.text for part in parts]),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[entry for part in logprobs for entry in part] if logprobs else None,
        offsets=[offset for part in parts for offset in part.offsets],
    )


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


@dataclass(slots=True)
class SequenceTimes:
    """Moments on the monotonic clock, in seconds."""

    arrival: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    last_token: float | None = None
    queued: float | None = None  # seconds before its first step, as the engine says


@dataclass(slots=True, eq=False)
class Sequence:
    """One engine request as the client follows it. `output_ids` starts with what it resumed from."""

    index: int
    prompt: int  # which prompt of the call
    request: AddRequest
    detokenizer: Detokenizer
    text_base: int = 0  # characters that belong to the output it resumed from
    output_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    speculation: SpeculationStats | None = None
    finish_reason: FinishReason | None = None
    times: SequenceTimes = field(default_factory=SequenceTimes)

    @property
    def num_new_tokens(self) -> int:
        return len(self.output_ids) - len(self.request.output_ids)

    def take(self, output: RequestOutput) -> Delta:
        """Account for a step's output; a stop string in it ends the sequence before the engine knows."""
        piece = self.detokenizer.push(output.token_ids, last=output.finish_reason is not None)
        token_ids = output.token_ids[: piece.num_tokens]
        self.output_ids += token_ids
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        self.speculation = output.speculation or self.speculation
        self.finish_reason = "stop" if piece.stop is not None else output.finish_reason
        return Delta(
            index=self.index,
            text=piece.text,
            token_ids=token_ids,
            logprobs=None if output.logprobs is None else output.logprobs[: piece.num_tokens],
            offsets=[offset - self.text_base for offset in piece.offsets] if piece.offsets else [],
            finish_reason=self.finish_reason,
            stop_reason=piece.stop if piece.stop is not None else output.stop_token_id,
        )


def begin_sequence(tokenizer: Decoder, index: int, prompt: int, request: AddRequest) -> Sequence:
    """A sequence as it starts, or goes on after `request.output_ids`; raises InvalidRequestError if these ended it."""
    params = request.params
    detokenizer = Detokenizer(
        tokenizer,
        params.stop,
        context=request.prompt_ids,
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
        offsets=params.logprobs is not None,
    )
    detokenizer.push(request.output_ids)
    if detokenizer.stop is not None:
        raise InvalidRequestError(f"output_ids already holds the stop string {detokenizer.stop!r}.", param="output_ids")
    text_base = detokenizer.num_characters
    return Sequence(index, prompt, request, detokenizer, text_base, output_ids=list(request.output_ids))


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
