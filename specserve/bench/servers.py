"""A server of a comparison: started in a session of its own, ready when it answers, gone when it is needed no more."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from specserve.bench.engines import HOST, complete_command
from specserve.bench.guard import Guard, descendants, kill_those, signal_session
from specserve.bench.variants import Variant

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
ANSWER_SECONDS = 10.0  # for /health and the like
_NO_MEMORY = re.compile(
    r"out of memory|MemoryError|cannot allocate memory|no available memory|not enough memory|KV cache has \d+ blocks"
    r"|less than desired GPU memory",
    re.IGNORECASE,
)


class ServerFailedError(Exception):
    """A server did not start or died; the text is one sentence or two for the user."""

    def __init__(self, variant: str, message: str, *, lacks_memory: bool = False) -> None:
        super().__init__(message)
        self.variant = variant
        self.lacks_memory = lacks_memory


@dataclass(frozen=True, slots=True)
class RunningServer:
    """One that answers. Those reached by URL have neither process nor log."""

    variant: Variant
    url: str
    command: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    guard: Guard | None = None

    def check_alive(self) -> None:
        """Raise ServerFailedError if its process has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise _ended(self, "while it was measured")


async def start_server(
    variant: Variant, log: Path, *, share: float, taken: float, timeout: float, started: list[RunningServer]
) -> RunningServer:
    """Start a variant and wait until it answers; one of a URL is only asked whether it does.

    `share`, `taken`: of the device's memory, for this server and by those before it. What has a process is appended to
    `started` at once, so that whoever stops them all misses none. Raises ServerFailedError.
    """
    if variant.url is not None:
        server = RunningServer(variant, variant.url)
        await _wait_for_url(server)
        return server
    port = free_port()
    command = tuple(complete_command(variant.command, port=port, share=share, taken=taken))
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        process, guard = _spawn(command, log, {**os.environ, **variant.environment})
    except OSError as error:
        raise ServerFailedError(variant.name, f"{variant.name} cannot be started: {error}.") from error
    server = RunningServer(variant, f"http://{HOST}:{port}", command, process, log, guard)
    started.append(server)
    await _wait_until_ready(server, timeout)
    return server


def _spawn(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Guard]:
    """A process, and who ends it if we are killed. Raises OSError."""
    guard = Guard(GRACE_SECONDS)
    try:
        with log.open("wb") as output:
            # Its own session: a Ctrl-C in the terminal is for us alone, and one signal reaches all that it starts.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
    except OSError:
        guard.dismiss()
        raise
    guard.watch(process.pid)
    return process, guard


async def stop_servers(servers: Iterable[RunningServer]) -> None:
    """SIGTERM, and SIGKILL for what is left after a grace; a cancellation cuts the grace short."""
    running = [(server, server.process) for server in servers if server.process is not None]
    families = {process.pid: descendants(process.pid) for _, process in running if process.poll() is None}
    for _, process in running:
        signal_session(process.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE_SECONDS
    try:
        while any(process.poll() is None for _, process in running) and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
    finally:
        for _, process in running:
            signal_session(process.pid, signal.SIGKILL)
            process.wait()
        for family in families.values():  # engines may have left for sessions of their own
            kill_those(family)
        for server, _ in running:
            if server.guard is not None:
                server.guard.dismiss()


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def _wait_until_ready(server: RunningServer, timeout: float) -> None:
    assert server.process is not None
    end = time.monotonic() + timeout
    while server.process.poll() is None:
        if await answers(server.url + "/health"):
            return
        if time.monotonic() > end:
            raise _failed(server, f"did not answer at {server.url}/health within {timeout:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
    raise _ended(server, "before it was ready")


async def _wait_for_url(server: RunningServer) -> None:
    if not await answers(server.url + "/health") and not await answers(server.url + "/v1/models"):
        name = server.variant.name
        raise ServerFailedError(name, f"{name}: no server answers at {server.url} (neither /health nor /v1/models).")


async def answers(url: str) -> bool:
    """Whether anything listens there and does not fail; one that wants a key first is there too."""
    limit = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    try:
        async with aiohttp.ClientSession(timeout=limit) as session, session.get(url) as response:
            return response.status in (200, 401, 403)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


def _ended(server: RunningServer, when: str) -> ServerFailedError:
    assert server.process is not None
    status = server.process.returncode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return _failed(server, f"{how} {when}", killed=status == -signal.SIGKILL)


def _failed(server: RunningServer, what: str, *, killed: bool = False) -> ServerFailedError:
    """`killed`: by SIGKILL, which is what a system out of memory sends."""
    assert server.log is not None
    text = server.log.read_text(errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it wrote nothing")
    why = "perhaps for lack of memory" if killed else last[:300]  # who is killed has no time to say why
    return ServerFailedError(
        server.variant.name,
        f"{server.variant.name} ({server.variant.title}) {what}: {why} (log: {server.log})",
        lacks_memory=killed or _NO_MEMORY.search(text) is not None,
    )
