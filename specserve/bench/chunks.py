"""Server-sent events of OpenAI's streaming API, as far as a benchmark looks at them.

The types name only what is read: msgspec skips the rest, and a chunk of a few hundred bytes takes about a microsecond.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Delta(msgspec.Struct):
    """Of a chat. Servers name a thinking model's thoughts either way."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        return self.content or self.reasoning_content or self.reasoning or ""


class Choice(msgspec.Struct):
    index: int = 0
    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class Speculation(msgspec.Struct):
    """specserve's."""

    drafted_per_position: list[int] = []
    accepted_per_position: list[int] = []


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    speculation: Speculation | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None


DONE = b"[DONE]"
_decode = msgspec.json.Decoder(Chunk).decode


class ChunkReader:
    """Bytes as they come, in chunks wherever the network cut them."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> list[Chunk]:
        """What has become whole with `data`; raises msgspec.DecodeError for an event that is no chunk."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # blank, a comment that keeps the connection, an event's name
            payload = line[5:].strip()
            if payload == DONE:
                self.done = True
            else:
                found.append(_decode(payload))
        return found


def error_text(value: Any) -> str:
    """The sentence in whatever shape a server gives its errors."""
    while isinstance(value, dict):
        value = value.get("error") or value.get("message") or value.get("detail") or str(value)
    return str(value)[:500]
