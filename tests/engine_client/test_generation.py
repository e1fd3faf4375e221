"""What waits in a Generation: taken one by one, all at once, or by a listener in the reader's own turn."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from specserve.core.errors import EngineDeadError
from specserve.core.messages import TokenLogprobs
from specserve.engine.client.generation import Generation
from specserve.engine.client.sequence import Delta, Sequence, join_deltas

A, B, C = TokenLogprobs(1, -1.0), TokenLogprobs(2, -2.0), TokenLogprobs(3, -3.0)


def generation(num_sequences: int = 1) -> Generation:
    return Generation([cast(Sequence, None)] * num_sequences, lambda sequences: None)


def delta(text: str, index: int = 0, end: bool = False) -> Delta:
    return Delta(index, text, [ord(char) for char in text], None, [], "length" if end else None)


def test_joined_deltas_say_what_their_parts_said() -> None:
    parts = [
        Delta(0, "a", [1], [A], [0]),
        Delta(1, "", [7], None, []),
        Delta(0, "bc", [2, 3], [B, C], [1, 2], "stop", "!"),
    ]
    assert list(join_deltas(parts)) == [Delta(0, "abc", [1, 2, 3], [A, B, C], [0, 1, 2], "stop", "!"), parts[1]]


async def test_steps_that_wait_are_taken_together() -> None:
    made = generation(2)
    for item in (delta("a"), delta("x", 1), delta("b", end=True)):
        made.put(item)
    made.wake()
    assert list(await made.take_all()) == [delta("ab", end=True), delta("x", 1)]
    taker = asyncio.create_task(made.take_all())
    await asyncio.sleep(0)
    assert not taker.done()
    made.put(delta("y", 1, end=True))
    made.wake()
    assert list(await taker) == [delta("y", 1, end=True)]
    assert list(await made.take_all()) == []


async def test_an_error_comes_after_what_was_said_before_it() -> None:
    made = generation(2)
    for item in (delta("a"), EngineDeadError("dead"), delta("b", 1)):
        made.put(item)
    assert list(await made.take_all()) == [delta("a")]
    with pytest.raises(EngineDeadError):
        await made.take_all()
    assert list(await made.take_all()) == []


async def test_what_a_listener_takes_wakes_nobody() -> None:
    made = generation()
    heard: list[object] = []

    def listen() -> None:
        while made.queued and cast(Delta, made.queued[0]).finish_reason is None:
            heard.append(made.queued.popleft())

    made.listener = listen
    taker = asyncio.create_task(made.take_all())
    for text in "ab":
        await asyncio.sleep(0)
        made.put(delta(text))
        made.wake()
    await asyncio.sleep(0)
    assert heard == [delta("a"), delta("b")]
    assert not taker.done()
    made.put(delta("c", end=True))
    made.wake()
    assert list(await taker) == [delta("c", end=True)]
    assert list(await made.take_all()) == []
