"""One server, one base model, several adapters in one batch, each drafted for; and one more loaded while they run.

    make demo          or          python examples/demo.py ["list all users"]

Starts `specserve serve` on the bundled models, which needs neither network nor GPU, and talks to it over HTTP as any
client would.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from specserve.config import DEMO_ROOT

WIDTH = 88
MAX_TOKENS = 120
LATER = "css"  # the adapter that the server does not know at start


@dataclass
class Answer:
    """One streamed answer: its text, the server's own accounting, and how long it took."""

    title: str
    text: str
    usage: dict[str, Any]
    seconds: float

    def show(self) -> None:
        drafts = self.usage["speculation"]
        tokens = self.usage["completion_tokens"]
        print(f"\n── {self.title} {'─' * (WIDTH - len(self.title) - 4)}")
        print(self.text.strip())
        print(f"   {tokens} tokens, {tokens / self.seconds:.0f} tokens/s; {accepted(drafts)}")


def accepted(drafts: dict[str, Any]) -> str:
    """ "31 of 40 drafted tokens accepted (78 %)"."""
    drafted, taken = drafts["drafted"], drafts["accepted"]
    share = f" ({taken / drafted:.0%})" if drafted else ""
    return f"{taken} of {drafted} drafted tokens accepted{share}"


@asynccontextmanager
async def running_server() -> AsyncIterator[str]:
    """Start the server on a free port, yield its URL once it is ready, stop it as an operator would."""
    command = [str(Path(sys.executable).with_name("specserve")), "serve", "--port", "0"]
    server = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    assert server.stdout is not None
    log = asyncio.create_task(server.stderr.read() if server.stderr else asyncio.sleep(0))
    try:
        async for line in server.stdout:
            if line.startswith(b"Ready: "):
                yield line.split()[1].decode()
                break
        else:
            sys.exit(f"The server did not start:\n{(await log or b'').decode()}")
    finally:
        if server.returncode is None:
            server.terminate()
        print(f"Server stopped, exit code {await server.wait()}.")


async def ask(http: aiohttp.ClientSession, title: str, message: str, started: asyncio.Event, **fields: Any) -> Answer:
    """Stream one chat completion; `started` is set at its first token."""
    body = {
        "messages": [{"role": "user", "content": message}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, usage = "", dict[str, Any]()
    begin = time.perf_counter()
    async with http.post("/v1/chat/completions", json=body | fields) as response:
        response.raise_for_status()
        async for line in response.content:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                sys.exit(f"{title}: {event['error']['message']}")
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
            usage = event.get("usage") or usage
            started.set()
    return Answer(title, text, usage, time.perf_counter() - begin)


async def load_and_ask(http: aiohttp.ClientSession, message: str, running: list[asyncio.Event]) -> Answer:
    """Once every other stream has begun, load one more adapter and use it at once, in the same batch."""
    await asyncio.gather(*(event.wait() for event in running))
    begin = time.perf_counter()
    async with http.post("/v1/adapters", json={"name": LATER, "path": str(DEMO_ROOT / "more" / LATER)}) as response:
        response.raise_for_status()
    title = f"{LATER}, loaded in {1000 * (time.perf_counter() - begin):.0f} ms while the others were running"
    return await ask(http, title, message, asyncio.Event(), model=LATER)


async def main(message: str) -> None:
    print("Starting specserve on the bundled models …")
    async with running_server() as url, aiohttp.ClientSession(url) as http:
        async with http.get("/v1/adapters") as response:
            adapters = [adapter["name"] for adapter in (await response.json())["data"]]
        print(f"Ready at {url}. One batch: the base, {', '.join(adapters)}, and a sum. All are asked: {message!r}")
        wanted: dict[str, dict[str, Any]] = {"base": {}}
        wanted |= {name: {"lora": name} for name in adapters}
        half = [{"name": name, "scale": 0.5} for name in adapters[:2]]
        wanted[f"½ {adapters[0]} + ½ {adapters[1]}"] = {"lora": half}
        running = [asyncio.Event() for _ in wanted]
        begin = time.perf_counter()
        answers = await asyncio.gather(
            *(ask(http, title, message, event, **f) for (title, f), event in zip(wanted.items(), running, strict=True)),
            load_and_ask(http, message, running),
        )
        seconds = time.perf_counter() - begin
        for answer in answers:
            answer.show()
        tokens = sum(answer.usage["completion_tokens"] for answer in answers)
        total = {key: sum(answer.usage["speculation"][key] for answer in answers) for key in ("drafted", "accepted")}
        print(f"\nTogether {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s; {accepted(total)}.")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "list all users"))
