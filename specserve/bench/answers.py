"""One streamed answer in the making: what each event brought, of each of the answer's choices.

With `n` > 1 an answer has several choices, in events of their own or together in one, in any order. All of their tokens
count, each event once: a rate is that of the request. Their texts are kept in the order of the choices, so that two
servers' answers can be compared however their events came.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from specserve.bench.chunks import Choice, Chunk, error_text
from specserve.bench.records import Event, RequestRecord, TracedRequest


def choices_asked(request: TracedRequest) -> int:
    """`n` of the request; what is no number of choices the server refuses."""
    n = request.fields.get("n")
    return n if isinstance(n, int) and n > 0 else 1


@dataclass(slots=True)
class _Choice:
    """What has come of one choice."""

    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    finish_reason: str | None = None

    def add(self, part: Choice) -> int:
        """Take in its part of an event; how many tokens that stands for, as far as it tells itself."""
        text = part.text or "" if part.delta is None else part.delta.text
        if text:
            self.texts.append(text)
        if part.finish_reason:  # TGI's is "" until then
            self.finish_reason = part.finish_reason
        if part.token_ids is not None:
            tokens = len(part.token_ids)
        else:  # a chat's first event may bring its role alone; any other stands for a token, though its text may wait
            tokens = 1 if text or part.delta is None or part.finish_reason else 0
        self.tokens += tokens
        return tokens


@dataclass(slots=True)
class Answer:
    """`asked`: how many choices. Times are s after the run's start."""

    asked: int = 1
    events: list[Event] = field(default_factory=list)
    error: str | None = None
    _choices: dict[int, _Choice] = field(default_factory=dict)
    _prompt_tokens: int | None = None
    _output_tokens: int | None = None
    _drafted: list[int] = field(default_factory=list)
    _accepted: list[int] = field(default_factory=list)

    def add(self, chunk: Chunk, now: float) -> None:
        if chunk.error is not None:
            self.error = error_text(chunk.error)
        counted = self._usage(chunk)
        if chunk.choices:
            self.events.append(Event(now, self._tokens(chunk.choices, counted)))

    def _tokens(self, parts: list[Choice], counted: int | None) -> int:
        """Of one event. `counted`: of its choices since they began, as servers count on the way: vLLM and SGLang, whose
        events have one choice each, that one's."""
        choices = [self._choice(part.index) for part in parts]
        before = sum(choice.tokens for choice in choices)
        tokens = sum(choice.add(part) for choice, part in zip(choices, parts, strict=True))
        if counted is None or parts[0].token_ids is not None:
            return tokens
        told = max(counted - before, 0)
        choices[0].tokens += told - tokens
        return told

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice()
        return self._choices[index]

    def _usage(self, chunk: Chunk) -> int | None:
        """Take in what a chunk says of usage; the output tokens that it tells of, if it does."""
        usage = chunk.usage
        if usage is None:
            return None
        self._prompt_tokens = usage.prompt_tokens
        if self.asked == 1 or not chunk.choices:  # else it may be of one choice among several
            self._output_tokens = usage.completion_tokens
        if usage.speculation is not None:
            self._drafted = usage.speculation.drafted_per_position
            self._accepted = usage.speculation.accepted_per_position
        return usage.completion_tokens

    def record(self, request: TracedRequest, sent: float, end: float) -> RequestRecord:
        """`finish_reason` is the first choice's."""
        choices = [choice for _, choice in sorted(self._choices.items())]
        tokens = sum(choice.tokens for choice in choices)
        return RequestRecord(
            index=request.index,
            sent=sent,
            events=self.events,
            end=end,
            prompt_tokens=request.prompt_tokens if self._prompt_tokens is None else self._prompt_tokens,
            output_tokens=tokens if self._output_tokens is None else self._output_tokens,
            text="\n".join("".join(choice.texts) for choice in choices),
            finish_reason=choices[0].finish_reason if choices else None,
            error=self.error or self._cut(choices),
            adapter=request.adapter,
            drafted_per_position=self._drafted,
            accepted_per_position=self._accepted,
        )

    def _cut(self, choices: list[_Choice]) -> str | None:
        """What is wrong with a stream that ended by itself, if anything is."""
        ended = sum(choice.finish_reason is not None for choice in choices)
        if ended >= max(self.asked, len(choices)):
            return None
        if self.asked == 1:
            return "The stream ended before the answer did."
        return f"The stream ended when {ended} of {self.asked} choices had."
