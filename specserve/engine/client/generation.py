"""One generate call on its way: its sequences (one a prompt and sample), what each step brought, what it cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
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

    `token_ids`, `logprobs` and `offsets` (characters into this response's text) run in parallel; `text` may lag behind
    them while a character or a stop string is unfinished.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    offsets: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token that ended it


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
            offsets=[offset - self.text_base for offset in piece.offsets],
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
    )
    detokenizer.push(request.output_ids)
    if detokenizer.stop is not None:
        raise InvalidRequestError(f"output_ids already holds the stop string {detokenizer.stop!r}.", param="output_ids")
    text_base = detokenizer.num_characters
    return Sequence(index, prompt, request, detokenizer, text_base, output_ids=list(request.output_ids))


class Generation:
    """An async iterator of Deltas, and a context manager: leaving it early aborts what still runs.

    Iteration raises the SpecserveError of the first sequence that failed; EngineDeadError leaves `resume_points`.
    """

    def __init__(self, sequences: list[Sequence], abort: Callable[[list[Sequence]], None]) -> None:
        self.sequences = sequences
        self._abort = abort
        self._queue: asyncio.Queue[Delta | SpecserveError] = asyncio.Queue()
        self._num_open = len(sequences)

    def put(self, item: Delta | SpecserveError) -> None:
        """Called by the engine's reader, never by users."""
        self._queue.put_nowait(item)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        if self._num_open == 0:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, SpecserveError):
            self._num_open = 0
            raise item
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
