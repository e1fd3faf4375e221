"""Frames between the API process and the engine process: a 4-byte big-endian length, then one msgpack message."""

from __future__ import annotations

import select
import socket
import struct
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
HEADER = struct.Struct(">I")
_RECEIVE_BYTES = 1 << 18
_ENCODER = msgspec.msgpack.Encoder()


class PeerGoneError(ConnectionError):
    """The other process closed its end or died."""


def encode_frame(message: Any) -> bytes:
    """One framed message, ready to be written as it is."""
    buffer = bytearray(HEADER.size)
    _ENCODER.encode_into(message, buffer, HEADER.size)
    HEADER.pack_into(buffer, 0, len(buffer) - HEADER.size)
    return bytes(buffer)


class FrameBuffer:
    """Bytes in, whole frames out; a partial one stays until its rest arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The message of the next whole frame, if there is one."""
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._buffer)[0]
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[HEADER.size : end])
        del self._buffer[:end]
        return frame


class Channel:
    """The engine's end of the socket: blocking writes, reads with a time limit.

    Every method raises PeerGoneError once the peer is gone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, message: Any) -> None:
        try:
            self._sock.sendall(encode_frame(message))
        except OSError as error:
            raise PeerGoneError(str(error)) from error

    def receive_one(self, decoder: msgspec.msgpack.Decoder[T]) -> T:
        """The next message, however long it takes."""
        while True:
            frame = self._buffer.next()
            if frame is not None:
                return decoder.decode(frame)
            self._fill()

    def receive(self, decoder: msgspec.msgpack.Decoder[T], timeout: float | None) -> list[T]:
        """Every message that has arrived; waits `timeout` seconds (None: without end, 0: not at all) for a first."""
        if self._poll.poll(None if timeout is None else timeout * 1e3):
            self._fill()
        messages = []
        while (frame := self._buffer.next()) is not None:
            messages.append(decoder.decode(frame))
        return messages

    def _fill(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise PeerGoneError(str(error)) from error
        if not data:
            raise PeerGoneError("the other end was closed")
        self._buffer.feed(data)
