"""A client that streams: one request in, one record of what came when out. It is cheap, for it shares the machine."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec

from specserve.bench.answers import Answer, choices_asked
from specserve.bench.chunks import ChunkReader, error_text
from specserve.bench.records import RequestRecord, TracedRequest
from specserve.bench.target import Target

CONNECT_SECONDS = 30.0
PROBES, PROBE_SECONDS = 4, 0.25  # a server that refuses this often, so far apart, is gone
ANSWER_SECONDS = 5.0  # one that does not answer within is busy
MOST_SOCKETS = 65536


class Client:
    """Sends requests to one server over connections that are kept."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self.target = target
        self._session = session

    async def send(self, request: TracedRequest, start: float) -> RequestRecord:
        """Stream one request; times are s after `start` (time.perf_counter). Whatever goes wrong is in the record."""
        body, answer = msgspec.json.encode(self.target.body(request)), Answer(choices_asked(request))
        sent = time.perf_counter() - start
        try:
            async with self._session.post(self.target.generate_url, data=body) as response:
                if response.status != 200:
                    answer.error = f"{response.status}: {await _refusal(response)}"
                else:
                    await _read(response, answer, start)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        except msgspec.DecodeError as error:
            answer.error = f"The server sent an event that is no chunk of an answer: {error}"
        return answer.record(request, sent, time.perf_counter() - start)

    async def alive(self) -> bool:
        """Whether the server still takes connections, however busy it is."""
        for probe in range(PROBES):
            if probe:
                await asyncio.sleep(PROBE_SECONDS)
            try:
                async with self._session.get(self.target.url + "/health", timeout=_PROBE_TIMEOUT):
                    return True
            except TimeoutError:
                return True
            except aiohttp.ClientError:
                continue
        return False


_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=ANSWER_SECONDS)


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Client]:
    """A client whose connections end with the block."""
    _allow_many_sockets()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    # Servers close idle connections after 5 s (uvicorn) or more: one that is about to be closed is not used again.
    connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=None, keepalive_timeout=3)
    headers = {"Content-Type": "application/json", **target.headers}
    skipped = ("User-Agent", "Accept-Encoding")
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, skip_auto_headers=skipped
    ) as session:
        yield Client(target, session)


def _allow_many_sockets() -> None:
    """Each stream has a socket, and a process may often have but 1024 of them until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_SOCKETS if hard == resource.RLIM_INFINITY else min(MOST_SOCKETS, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _read(response: aiohttp.ClientResponse, answer: Answer, start: float) -> None:
    reader = ChunkReader()
    async for data in response.content.iter_any():
        now = time.perf_counter() - start
        for chunk in reader.feed(data):
            answer.add(chunk, now)


async def _refusal(response: aiohttp.ClientResponse) -> str:
    data = await response.read()
    try:
        value: Any = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return data.decode(errors="replace")[:500]
    return error_text(value)
