"""What is answered: one Answer makes a request's whole answer, or its stream's events, in either endpoint's shape."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from specserve.core.errors import SpecserveError
from specserve.engine.client.generation import Usage
from specserve.engine.client.sequence import Delta, join_deltas
from specserve.server.protocol import GenerateBody

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where the two endpoints differ. `content` of a choice is made from a delta, for a whole answer or for a chunk
    (the second argument tells whether it is the choice's first)."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    whole_content: Callable[[Delta], dict[str, Any]]
    chunk_content: Callable[[Delta, bool], dict[str, Any]]
    logprobs: Callable[[Delta], dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class _Frame:
    """An event without its text and token ids: `after_ids` is None where ids are not told."""

    before_text: bytes
    after_text: bytes
    after_ids: bytes | None

    def event(self, delta: Delta) -> bytes:
        text = _ENCODER.encode(delta.text)
        if self.after_ids is None:
            return self.before_text + text + self.after_text
        return b"".join((self.before_text, text, self.after_text, _ENCODER.encode(delta.token_ids), self.after_ids))


@dataclass(slots=True)
class Answer:
    """One request's answer in the making."""

    dialect: Dialect
    model: str
    include_usage: bool
    return_token_ids: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    begun: set[int] = field(default_factory=set)
    _frames: dict[int, _Frame] = field(default_factory=dict)

    @classmethod
    def of(cls, body: GenerateBody, dialect: Dialect, base: str) -> Answer:
        """As the body asks for it; `base` names the model where the body does not."""
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return cls(dialect, body.model or base, include_usage, bool(body.return_token_ids))

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """One delta's event."""
        first = delta.index not in self.begun
        self.begun.add(delta.index)
        made = self._head(self.dialect.chunk_object)
        made["choices"] = [self._choice(delta, self.dialect.chunk_content(delta, first))]
        return made | {"usage": None} if self.include_usage else made

    def event(self, delta: Delta) -> bytes:
        """One delta's event as it is sent."""
        data = event_bytes(self.chunk(delta))
        if delta.index not in self._frames:
            self._frames[delta.index] = self._frame(delta.index)
        return data

    def quick_events(self, items: Sequence[Delta | SpecserveError]) -> bytes | None:
        """The events of these as `event` makes them, of each choice one, put together from what all of its have in
        common; None where an item is more than text in the midst of a choice."""
        deltas = [item for item in items if isinstance(item, Delta) and item.index in self._frames and _is_plain(item)]
        if len(deltas) < len(items):
            return None
        joined = join_deltas(deltas)
        return b"".join([self._frames[delta.index].event(delta) for delta in joined if says_something(delta)])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The event after the last delta: no choices, but what it all cost."""
        return {**self._head(self.dialect.chunk_object), "choices": [], "usage": usage_body(usage)}

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        """The one answer of a request that does not stream."""
        choices = [self._choice(delta, self.dialect.whole_content(delta)) for delta in deltas]
        return {**self._head(self.dialect.whole_object), "choices": choices, "usage": usage_body(usage)}

    def _frame(self, index: int) -> _Frame:
        """What all events of a choice share, once it has begun: cut out of one that says what no other can."""
        mark = f"{self.id} text"
        data = event_bytes(self.chunk(Delta(index, mark, [], None, [])))
        before, _, after = data.partition(_ENCODER.encode(mark))
        if not self.return_token_ids:
            return _Frame(before, after, None)
        between, _, after = after.rpartition(_ENCODER.encode([]))
        return _Frame(before, between, after)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.dialect.id_prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, delta: Delta, content: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": delta.index,
            **content,
            "logprobs": self.dialect.logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        return choice | {"token_ids": delta.token_ids} if self.return_token_ids else choice


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object, with what speculation did."""
    spec = usage.speculation
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "speculation": {
            "rounds": spec.rounds,
            "drafted": spec.drafted,
            "accepted": spec.accepted,
            "drafted_per_position": spec.drafted_per_position,
            "accepted_per_position": spec.accepted_per_position,
        },
    }


def says_something(delta: Delta) -> bool:
    """Whether it is worth an event."""
    return bool(delta.token_ids or delta.text or delta.finish_reason is not None)


def event_bytes(value: dict[str, Any]) -> bytes:
    """A server-sent event that holds JSON."""
    return b"data: " + _ENCODER.encode(value) + b"\n\n"


def _is_plain(delta: Delta) -> bool:
    return delta.finish_reason is None and delta.logprobs is None and delta.stop_reason is None
