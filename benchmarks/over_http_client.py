"""A client process of the benchmark over HTTP: it notes when each event came, and how many tokens it brought."""

from __future__ import annotations

import json
import select
import socket
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import msgspec

RECEIVE_BYTES = 1 << 16

Arrivals = list[tuple[float, int]]  # of one stream: seconds on the monotonic clock, tokens that came then


class _Choice(msgspec.Struct):
    token_ids: list[int]


class _Event(msgspec.Struct):
    choices: list[_Choice]


@dataclass(slots=True)
class _Stream:
    sock: socket.socket
    arrivals: Arrivals = field(default_factory=list)
    rest: bytes = b""
    over: bool = False

    def read(self, decoder: msgspec.json.Decoder[_Event]) -> None:
        """Take in what the socket holds; the lines of an event are JSON, the others lengths of chunks and headers."""
        data = self.sock.recv(RECEIVE_BYTES)
        now = time.monotonic()
        if not data:
            raise ConnectionError(f"The server ended a stream: {self.rest[-500:]!r}")
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                count = sum(len(choice.token_ids) for choice in decoder.decode(line[6:]).choices)
                self.arrivals.append((now, count))
            self.over = self.over or line == b"data: [DONE]"


def work(pipe: Connection) -> None:
    """Answer (URL, bodies of completions) with each one's Arrivals, until the pipe closes."""
    while True:
        try:
            url, bodies = pipe.recv()
        except EOFError:
            return
        pipe.send(stream_all(url, bodies))


def stream_all(url: str, bodies: list[dict[str, object]]) -> list[Arrivals]:
    """Ask for all of these at once and read until the last one has ended."""
    decoder = msgspec.json.Decoder(_Event)
    streams = [_Stream(_post(url, body | {"stream": True, "return_token_ids": True})) for body in bodies]
    by_number = {stream.sock.fileno(): stream for stream in streams}
    poller = select.epoll()
    for number in by_number:
        poller.register(number, select.EPOLLIN)
    while by_number:
        for number, _ in poller.poll():
            stream = by_number[number]
            stream.read(decoder)
            if stream.over:
                del by_number[number]
                poller.unregister(number)
                stream.sock.close()
    return [stream.arrivals for stream in streams]


def _post(url: str, body: dict[str, object]) -> socket.socket:
    """A connection that has asked for a completion and not read."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    sock = socket.create_connection((parts.hostname or "", parts.port or 80))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock
