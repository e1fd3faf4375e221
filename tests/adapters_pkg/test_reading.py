"""The threads that read, and in which order their results come in."""

from __future__ import annotations

import threading

import pytest

from specserve.core.errors import AdapterError
from specserve_adapters.reading import ReadQueue
from specserve_adapters.store import StoredAdapter


def test_an_unforeseen_failure_fails_its_own_read(caplog: pytest.LogCaptureFixture) -> None:
    def read(job: str) -> StoredAdapter:
        raise ZeroDivisionError(job)

    queue = ReadQueue(read)
    for job in ("first", "second", "third"):
        queue.submit(job)
    ended: dict[str, str] = {}
    while len(queue):
        queue.wait(30)
        for job, result in queue.finished():
            assert isinstance(result, AdapterError)
            ended[job] = result.message
            queue.pop(job)
    assert list(ended) == ["first", "second", "third"]
    assert all(f"ZeroDivisionError: {job}" in message for job, message in ended.items())
    assert queue.finished() == []
    queue.close()
    assert len(caplog.records) == 3


def test_one_slow_read_holds_up_nobody_else() -> None:
    slow, fast = threading.Event(), threading.Event()
    begun: list[str] = []

    def read(job: str) -> StoredAdapter:
        begun.append(job)
        (slow if job == "slow" else fast).wait(30)
        raise AdapterError(job)

    unwanted = {"gone"}
    queue = ReadQueue(read, lambda job: job not in unwanted)
    for job in ("slow", "one", "gone", "two"):
        queue.submit(job)
    assert len(queue) == 4
    fast.set()
    ended: list[str] = []
    while len(ended) < 2:
        for job, _ in queue.finished():
            ended.append(job)
            queue.pop(job)
    assert ended == ["one", "two"]
    assert len(queue) == 1
    slow.set()
    assert queue.wait(30)
    assert [job for job, _ in queue.finished()] == ["slow"]
    assert not queue.wait(30)
    assert begun == ["slow", "one", "two"]
    assert queue.reads == 3
    queue.close()


def test_reads_of_one_name_are_told_of_in_their_order() -> None:
    """Of two reloads under way the later one decides, whichever is read faster."""
    slow = threading.Event()

    def read(job: str) -> StoredAdapter:
        if job == "old":
            slow.wait(30)
        raise AdapterError(job)

    queue = ReadQueue(read, name=lambda job: "the same")
    for job in ("old", "new"):
        queue.submit(job)
    while queue.reads < 1:
        queue.wait(0.01)
    assert queue.finished() == []
    slow.set()
    queue.wait(30)
    assert [job for job, _ in queue.finished()] == ["old", "new"]
    queue.close()


def test_the_end_comes_after_the_reads_under_way() -> None:
    go, ended = threading.Event(), threading.Event()

    def read(job: str) -> StoredAdapter:
        go.wait(30)
        assert not ended.is_set()
        raise AdapterError(job)

    queue = ReadQueue(read)
    queue.submit("last")
    queue.close(then=ended.set)
    assert not ended.is_set()
    go.set()
    assert ended.wait(30)
