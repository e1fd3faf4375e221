"""Start the engine's process and speak with it over an inherited socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from specserve.config import EngineConfig
from specserve.core.errors import EngineDeadError
from specserve.core.messages import Failed, FromEngine, Ready, Shutdown, ToEngine
from specserve.engine.core.framing import HEADER, FrameBuffer, encode_frame

ENGINE_CORE = "specserve.engine.core.core:make_core"
_READ_LIMIT = 1 << 24  # bytes buffered before the socket is left to fill
_READ_BYTES = 1 << 14  # taken at once: some hundreds of outputs, a few steps of a large batch


@dataclass(slots=True)
class EngineLink:
    """A running engine process and the socket to it."""

    process: asyncio.subprocess.Process
    ready: Ready
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def send(self, message: ToEngine) -> None:
        """Queue a message; a dead engine shows in `messages`, not here."""
        self._writer.write(encode_frame(message))

    async def messages(self) -> AsyncIterator[list[FromEngine]]:
        """Messages as they come, all that have come at once; ends when the process dies or closes."""
        decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        frames = FrameBuffer()
        while data := await self._read():
            frames.feed(data)
            messages = []
            while (frame := frames.next()) is not None:
                messages.append(decoder.decode(frame))
            yield messages
            await asyncio.sleep(0)  # others' turn: reading does not wait while the engine has said more

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_READ_BYTES)
        except ConnectionError:
            return b""

    async def close(self, timeout: float = 10.0) -> None:
        """Ask it to end; after `timeout` seconds kill it."""
        with contextlib.suppress(ConnectionError):
            self.send(Shutdown())
            self._writer.close()
        await _reap(self.process, timeout)


async def launch(config: EngineConfig, core: str = ENGINE_CORE) -> EngineLink:
    """Start an engine and wait until it can serve. `core` is the `module:factory` that makes what it drives.

    Raises the user error that it failed with (ModelLoadError, say), EngineDeadError if it died without a word.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        command = [sys.executable, "-m", "specserve.engine.core.process", "--fd", str(theirs.fileno()), "--core", core]
        # Its own session: a Ctrl-C in the terminal is for the server, which drains before it lets the engine go.
        process = await asyncio.create_subprocess_exec(
            *command, pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )
    try:
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_LIMIT)
        writer.write(encode_frame(config))
        message = await _first_message(reader, process)
    except BaseException:
        ours.close()
        await _reap(process, 0.0)
        raise
    return EngineLink(process, message, reader, writer)


async def _first_message(reader: asyncio.StreamReader, process: asyncio.subprocess.Process) -> Ready:
    try:
        message: Any = msgspec.msgpack.decode(await _read_frame(reader), type=Ready | Failed)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        status = await process.wait()
        raise EngineDeadError(f"The engine process ended with status {status} while it started.") from error
    if isinstance(message, Failed):
        raise message.error.to_error()
    assert isinstance(message, Ready)
    return message


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    return await reader.readexactly(length)


async def _reap(process: asyncio.subprocess.Process, timeout: float) -> None:
    try:
        await asyncio.wait_for(process.wait(), timeout)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
