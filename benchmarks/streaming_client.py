"""One client process of the streaming benchmark: many streams over raw sockets, counted and not parsed.

A parser of events would cost more than a server that writes them. Of an event's bytes, `[` comes once (choices) and
each word of the text brings one space (streaming_core.py); `data: ` brings another.
"""

from __future__ import annotations

import json
import select
import socket
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

RECEIVE_BYTES = 1 << 18
FOREVER = 1 << 19  # tokens a stream asks for: more than any run gives


@dataclass(frozen=True, slots=True)
class Load:
    """What one client process asks for."""

    url: str
    streams: int
    chat: bool


@dataclass(slots=True)
class Counts:
    """What came: events, tokens and bytes."""

    events: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def add(self, data: bytes) -> None:
        events = data.count(b"[")
        self.events += events
        self.tokens += data.count(b" ") - events
        self.num_bytes += len(data)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.events - other.events, self.tokens - other.tokens, self.num_bytes - other.num_bytes)


def run(load: Load, pipe: Connection) -> None:
    """Open the streams, say that all have begun, be told (start, end) on the monotonic clock, answer the Counts between
    the two."""
    poller, sockets = select.epoll(), {}
    for number in range(load.streams):
        sock = _open(load, number)
        sockets[sock.fileno()] = sock
        poller.register(sock, select.EPOLLIN)
    silent = set(sockets)
    total, at_start, start, end = Counts(), Counts(), float("inf"), float("inf")
    while (now := time.monotonic()) < end:
        if now < start:
            at_start = Counts(total.events, total.tokens, total.num_bytes)
        for number, _ in poller.poll(0.01):
            data = sockets[number].recv(RECEIVE_BYTES)
            if not data:
                raise ConnectionError("The server ended a stream.")
            total.add(data)
            if silent and b"[" in data:
                silent.discard(number)
                if not silent:
                    pipe.send("begun")
        if pipe.poll():
            start, end = pipe.recv()
    pipe.send(total - at_start)
    for sock in sockets.values():
        sock.close()


def _open(load: Load, number: int) -> socket.socket:
    """A stream that was asked for and not yet read."""
    url = urlsplit(load.url)
    asked: dict[str, object] = {"max_tokens": FOREVER, "temperature": 0, "seed": number, "stream": True}
    if load.chat:
        asked["messages"] = [{"role": "user", "content": "count"}]
    else:
        asked["prompt"] = [1]
    body = json.dumps(asked).encode()
    path = "/v1/chat/completions" if load.chat else "/v1/completions"
    sock = socket.create_connection((url.hostname or "", url.port or 80))
    head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock
