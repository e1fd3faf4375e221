"""A server that speaks OpenAI's streaming API and makes its tokens up, in a thread of this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

Body = dict[str, Any]
DEADLINE = 60.0  # seconds for what must happen; a failure then, not a hang


class FakeOpenAI:
    """Answers `max_tokens` times " w", `burst` tokens an event, an event each `gap` seconds. Choice i > 0 of `n` says
    " wi", in events of its own, the last choice's first, or all choices share theirs (`together`).

    `owner` is what /v1/models says of itself, and whose dialect of token counts it speaks. `refuse` gives a status and
    a message for bodies that it refuses. After `break_after` tokens a stream ends in an error, or just so
    (`break_silently`). `bodies` are those it was asked; `most` is how many ran at once at most. No answer begins before
    `crowd` requests have come.
    """

    def __init__(
        self,
        *,
        owner: str = "specserve",
        adapters: tuple[str, ...] = (),
        root: str | None = None,
        burst: int = 1,
        gap: float = 0.0,
        refuse: Callable[[Body], tuple[int, str] | None] = lambda body: None,
        break_after: int | None = None,
        break_silently: bool = False,
        together: bool = False,
        crowd: int = 1,
    ) -> None:
        self.bodies: list[Body] = []
        self.most = 0
        self._owner, self._adapters, self._root = owner, adapters, root
        self._burst, self._gap, self._refuse, self._break_after = burst, gap, refuse, break_after
        self._break_silently, self._together = break_silently, together
        self._crowd, self._crowded = crowd, asyncio.Event()
        self._running = 0
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._app(), shutdown_timeout=0.0)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._begin(), self._loop).result(DEADLINE)

    def __enter__(self) -> FakeOpenAI:
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Close the port and every connection, as a killed process does."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(DEADLINE)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _begin(self) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _end(self) -> None:
        for connection in list(self._runner.server.connections if self._runner.server else []):
            connection.force_close()
        await self._runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self._generate)
        if self._owner == "tgi":
            app.router.add_get("/info", self._info)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response({"router": "text-generation-router"})

    async def _models(self, request: web.Request) -> web.Response:
        owner = "someone" if self._owner == "tgi" else self._owner
        base = {"id": "base", "root": self._root, "parent": None, "owned_by": owner}
        rest = [{"id": name, "root": name, "parent": "base", "owned_by": owner} for name in self._adapters]
        return web.json_response({"object": "list", "data": [base, *rest]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        refused = self._refuse(body)
        if refused is not None:
            return web.json_response({"error": {"message": refused[1]}}, status=refused[0])
        self._running += 1
        self.most = max(self.most, self._running)
        if len(self.bodies) >= self._crowd:
            self._crowded.set()
        try:
            await asyncio.wait_for(self._crowded.wait(), DEADLINE)
            return await self._stream(request, body)
        finally:
            self._running -= 1

    async def _stream(self, request: web.Request, body: Body) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat, total, n = request.path.endswith("chat/completions"), body["max_tokens"], body.get("n", 1)
        if chat:
            role = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for index in range(n):
                await _send(response, {"choices": [{"index": index, **role}]})
        for made in range(0, total, self._burst):
            if self._break_after is not None and made >= self._break_after:
                if self._break_silently:
                    return response
                await _send(response, {"error": {"message": "the engine died"}})
                return response
            await asyncio.sleep(self._gap)
            for event in self._events(body, chat, min(self._burst, total - made), made):
                await _send(response, event)
        await _send(response, {"choices": [], "usage": self._usage(body, n * total)})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _events(self, body: Body, chat: bool, tokens: int, before: int) -> list[Body]:
        """What one step of the engine brings. Continuous usage is of an event's choices, as vLLM counts."""
        choices = [self._choice(body, chat, tokens, before, index) for index in reversed(range(body.get("n", 1)))]
        events: list[Body] = []
        for shared in [choices] if self._together else [[choice] for choice in choices]:
            event: Body = {"choices": shared, "usage": None}
            if body["stream_options"].get("continuous_usage_stats"):
                event["usage"] = {"prompt_tokens": 5, "completion_tokens": len(shared) * (before + tokens)}
            events.append(event)
        return events

    def _choice(self, body: Body, chat: bool, tokens: int, before: int, index: int) -> Body:
        text = (f" w{index}" if index else " w") * tokens
        ended = "length" if before + tokens == body["max_tokens"] else "" if self._owner == "tgi" else None
        choice: Body = {"index": index, "finish_reason": ended}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        if body.get("return_token_ids"):
            choice["token_ids"] = [7] * tokens
        return choice

    def _usage(self, body: Body, total: int) -> Body:
        usage: Body = {"prompt_tokens": 5, "completion_tokens": total}
        if self._owner == "specserve":
            usage["speculation"] = {"rounds": 9, "drafted_per_position": [9, 8], "accepted_per_position": [6, 2]}
        return usage


async def _send(response: web.StreamResponse, event: Body) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
