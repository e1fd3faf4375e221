"""Answers to a Generation: server-sent events, one a step and stream, or all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import HttpVersion11, web

from specserve.core.errors import EngineDeadError, SpecserveError
from specserve.engine.client.generation import Generation
from specserve.engine.client.sequence import Delta, join_deltas
from specserve.server.answer import Answer, event_bytes, says_something
from specserve.server.errors import error_body, json_response

SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a buffering proxy would hold the events back
}


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
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(answer.event(first))
    try:
        generation.listener = direct_writer(request, response, generation, answer)
        while deltas := await generation.take_all():
            if events := b"".join([answer.event(delta) for delta in deltas if says_something(delta)]):
                await response.write(events)
    except SpecserveError as error:
        await response.write(event_bytes({"error": _error_object(error, generation)}))
    else:
        if answer.include_usage:
            await response.write(event_bytes(answer.usage_chunk(generation.usage)))
        await response.write(b"data: [DONE]\n\n")
    finally:
        generation.listener = None
    await response.write_eof()
    return response


def direct_writer(
    request: web.Request, response: web.StreamResponse, generation: Generation, answer: Answer
) -> Callable[[], None] | None:
    """Writes what is queued into a response that has begun, in the turn of whoever calls: to wake a task and write
    through it costs more than all the rest of an event. The task gets what is not written here: whatever begins or ends
    a choice, and everything while the client reads too slowly.

    An event becomes a chunk of HTTP/1.1 (RFC 9112, section 7.1) here, past aiohttp's writer. That mixes with what the
    task writes, for aiohttp passes each write of a response that has begun to the transport before it waits for
    anything. None where that would not be so: without chunks (HTTP/1.0), or compressed, which keeps bytes back.
    """
    transport = request.transport
    if transport is None or not response.chunked or response.compression:
        return None
    limit = transport.get_write_buffer_limits()[1]

    def write() -> None:
        if transport.get_write_buffer_size() > limit or transport.is_closing():
            return
        events = answer.quick_events(generation.queued)
        if events is not None:
            generation.queued.clear()
        if events:
            transport.write(b"%x\r\n%b\r\n" % (len(events), events))

    return write


async def _collect(generation: Generation, answer: Answer) -> web.Response:
    """One answer; after an engine's death its error says how to resume."""
    parts: list[Delta] = []
    try:
        while deltas := await generation.take_all():
            parts += deltas
    except EngineDeadError as error:
        return json_response({"error": _error_object(error, generation)}, error.status, {"Retry-After": "1"})
    whole = sorted(join_deltas(parts), key=lambda delta: delta.index)
    return json_response(answer.whole(whole, generation.usage))


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
