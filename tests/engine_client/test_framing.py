"""Frames come out whole and in order, however the socket cut them."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from specserve.engine.core.framing import FrameBuffer, encode_frame


@given(messages=st.lists(st.binary(max_size=40) | st.integers(0, 99), max_size=8), size=st.integers(1, 30))
def test_any_cutting(messages: list[bytes | int], size: int) -> None:
    data = b"".join(map(encode_frame, messages))
    buffer, got = FrameBuffer(), []
    for start in range(0, len(data), size):
        buffer.feed(data[start : start + size])
        while (frame := buffer.next()) is not None:
            got.append(msgspec.msgpack.decode(frame))
    assert got == messages
