"""One sequence of a generate call as the client follows it, and what each step brings it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from specserve.core.errors import InvalidRequestError
from specserve.core.messages import AddRequest, FinishReason, RequestOutput, SpeculationStats, TokenLogprobs
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
