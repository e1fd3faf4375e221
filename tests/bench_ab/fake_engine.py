"""A server of OpenAI's completions that streams made-up tokens at a known pace: `fake_engine.py --port N …`.

Token i comes (i + 1) times the seconds a token after the request, whatever else runs, so that the ratio of two of them
is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
from pathlib import Path

from aiohttp import web


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token-seconds", type=float, default=0.002)
    parser.add_argument("--jitter", type=float, default=0.0, help="share by which a request's pace may differ")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", type=Path, help="a file that only one server at a time can hold, as memory is")
    parser.add_argument("--die-after", type=int, default=10**9, help="requests; the next one ends the process")
    parser.add_argument("--refuse", action="store_true", help="answer every request with an error")
    parser.add_argument("--wrong-after", type=int, default=10**9, help="tokens that are as everybody's")
    parser.add_argument("--child", type=Path, help="start a process of a session of its own, and write its id there")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--never-ready", action="store_true")
    return parser.parse_args()


class FakeEngine:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.taken, self.random = args, 0, random.Random(args.seed)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"}, status=503 if self.args.never_ready else 200)

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "fake-1", "device": "cpu", "weights": "int8", "more": 1})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.taken += 1
        if self.taken > self.args.die_after:
            print("the fake engine dies", flush=True)
            os._exit(3)
        if self.args.refuse:
            return web.json_response({"error": {"message": "no such thing"}}, status=400)
        pace = self.args.token_seconds * (1 + self.args.jitter * self.random.uniform(-1, 1))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        count = int(body.get("max_tokens") or 16)
        clock = asyncio.get_running_loop().time
        begin = clock()
        for place in range(count):
            await asyncio.sleep(begin + (place + 1) * pace - clock())
            text = f" w{place}" if place < self.args.wrong_after else " other"
            last = place == count - 1
            await self._send(response, [{"index": 0, "text": text, "finish_reason": "length" if last else None}])
        usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}
        await self._send(response, [], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _send(self, response: web.StreamResponse, choices: list[object], **more: object) -> None:
        body = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "fake", "choices": choices, **more}
        await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")


def main() -> None:
    args = arguments()
    if args.room is not None:
        try:
            args.room.touch(exist_ok=False)
        except FileExistsError:
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB.", flush=True)
            sys.exit(1)
    if args.child is not None:
        args.child.write_text(str(os.spawnlp(os.P_NOWAIT, "setsid", "setsid", "sleep", "600")))
    if args.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    engine, app = FakeEngine(args), web.Application()
    app.add_routes(
        [
            web.get("/health", engine.health),
            web.get("/version", engine.version),
            web.get("/v1/models", engine.models),
            web.post("/v1/completions", engine.completions),
        ]
    )
    try:
        web.run_app(app, host="127.0.0.1", port=args.port, handle_signals=not args.stubborn, print=lambda *_: None)
    finally:
        if args.room is not None:
            args.room.unlink()


if __name__ == "__main__":
    main()
