"""Answers from a Generation: as server-sent events, one a step and stream, or collected into one."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from specserve.core.errors import EngineDeadError, SpecserveError
from specserve.engine.client.generation import Delta, Generation, Usage
from specserve.server.errors import error_body, json_response
from specserve.server.protocol import GenerateBody

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a buffering proxy would hold the events back
}


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

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The event after the last delta: no choices, but what it all cost."""
        return {**self._head(self.dialect.chunk_object), "choices": [], "usage": usage_body(usage)}

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        """The one answer of a request that does not stream."""
        choices = [self._choice(delta, self.dialect.whole_content(delta)) for delta in deltas]
        return {**self._head(self.dialect.whole_object), "choices": choices, "usage": usage_body(usage)}

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


async def respond(request: web.Request, generation: Generation, answer: Answer, stream: bool) -> web.StreamResponse:
    """Answer a request; whichever way this ends, the client's going included, nothing goes on generating."""
    async with generation:
        if stream:
            return await _stream(request, generation, answer)
        return await _collect(generation, answer)


async def _stream(request: web.Request, generation: Generation, answer: Answer) -> web.StreamResponse:
    """Events. What fails before the first token is raised, and so gets a status of its own; later it is an event."""
    first = await anext(generation)
    response = web.StreamResponse(headers=SSE_HEADERS)
    await response.prepare(request)
    await response.write(_event(answer.chunk(first)))
    try:
        async for delta in generation:
            if delta.token_ids or delta.text or delta.finish_reason is not None:
                await response.write(_event(answer.chunk(delta)))
    except SpecserveError as error:
        await response.write(_event({"error": _error_object(error, generation)}))
    else:
        if answer.include_usage:
            await response.write(_event(answer.usage_chunk(generation.usage)))
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _collect(generation: Generation, answer: Answer) -> web.Response:
    """One answer; after an engine's death its error says how to resume."""
    whole: dict[int, Delta] = {}
    try:
        async for delta in generation:
            whole[delta.index] = _join(whole[delta.index], delta) if delta.index in whole else delta
    except EngineDeadError as error:
        return json_response({"error": _error_object(error, generation)}, error.status, {"Retry-After": "1"})
    return json_response(answer.whole([whole[index] for index in sorted(whole)], generation.usage))


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


def _error_object(error: SpecserveError, generation: Generation) -> dict[str, Any]:
    """The error of a request that had begun. After an engine's death it holds what resuming takes.

    `specserve.resume`: for each unfinished choice its index, output_ids and seed. The same request with these (and
    n = 1) goes on where it stopped.
    """
    body = error_body(error)
    if isinstance(error, EngineDeadError):
        body["specserve"] = {
            "resume": [
                {"index": point.index, "output_ids": point.output_ids, "seed": point.seed}
                for point in generation.resume_points
            ]
        }
    return body


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _join(first: Delta, second: Delta) -> Delta:
    return dataclasses.replace(
        second,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs if second.logprobs is None else (first.logprobs or []) + second.logprobs,
        offsets=first.offsets + second.offsets,
    )
