"""Servers start, tell why they do not, and are gone afterwards, whichever way that comes about."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from specserve.bench import servers
from specserve.bench.fleet import Fleet
from specserve.bench.servers import RunningServer, ServerFailedError, start_server, stop_servers
from specserve.bench.variants import Variant

Fake = Callable[..., Variant]
Gone = Callable[[int], bool]


async def start(variant: Variant, folder: Path, started: list[RunningServer], timeout: float = 30.0) -> RunningServer:
    return await start_server(variant, folder / "log", share=0.5, taken=0.0, timeout=timeout, started=started)


def fleet(folder: Path, *variants: Variant) -> Fleet:
    return Fleet(variants, folder, start_timeout=30.0, told=lambda line: None)


async def test_a_server_answers_and_goes(fake: Fake, tmp_path: Path) -> None:
    started: list[RunningServer] = []
    server = await start(fake("A"), tmp_path, started)
    assert started == [server]

    server.check_alive()
    await stop_servers(started)
    assert server.process is not None
    assert server.process.returncode == 0
    with pytest.raises(ServerFailedError, match=r"A .* ended with status 0 while it was measured"):
        server.check_alive()


async def test_a_stubborn_server_and_its_children_are_killed(
    fake: Fake, gone: Gone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "GRACE_SECONDS", 0.3)
    started: list[RunningServer] = []
    server = await start(fake("A", "--stubborn", "--child", str(tmp_path / "child")), tmp_path, started)
    child = int((tmp_path / "child").read_text())
    await stop_servers(started)
    assert server.process is not None
    assert server.process.returncode == -9
    assert gone(child)


async def test_a_second_interrupt_cuts_the_grace_short(fake: Fake, tmp_path: Path) -> None:
    started: list[RunningServer] = []
    server = await start(fake("A", "--stubborn"), tmp_path, started)
    stopping = asyncio.create_task(stop_servers(started))
    await asyncio.sleep(0.2)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert server.process is not None
    assert server.process.returncode == -9


async def test_why_a_server_does_not_start(fake: Fake, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.touch()
    started: list[RunningServer] = []
    with pytest.raises(ServerFailedError, match=r"A .* ended with status 1 before.*out of memory.*log: ") as failure:
        await start(fake("A", "--room", str(room)), tmp_path, started)
    assert failure.value.lacks_memory
    with pytest.raises(ServerFailedError, match=r"unrecognized arguments: --nonsense") as failure:
        await start(fake("A", "--nonsense"), tmp_path, started)
    assert not failure.value.lacks_memory
    with pytest.raises(ServerFailedError, match=r"did not answer at .*/health within 1 s"):
        await start(fake("A", "--never-ready"), tmp_path, started, timeout=1.0)
    await stop_servers(started)
    with pytest.raises(ServerFailedError, match=r"no server answers at http://127\.0\.0\.1:9"):
        await start(Variant("B", "gone", url="http://127.0.0.1:9"), tmp_path, started)


async def test_a_fleet_is_gone_after_whatever_happens(fake: Fake, gone: Gone, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with fleet(tmp_path, fake("A"), fake("B")) as both:
            assert await both.start_together() is None
            pids = [both.running(name).process.pid for name in "AB"]  # type: ignore[union-attr]
            raise ZeroDivisionError
    assert all(map(gone, pids))


async def test_a_fleet_that_is_cancelled_while_it_starts(fake: Fake, gone: Gone, tmp_path: Path) -> None:
    child = tmp_path / "child"

    async def run() -> None:
        async with fleet(tmp_path, fake("A", "--never-ready", "--child", str(child)), fake("B")) as both:
            await both.start_together()

    task = asyncio.create_task(run())
    while not child.exists() or not child.read_text():
        await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gone(int(child.read_text()))


async def test_those_that_do_not_fit_together_run_alone(fake: Fake, tmp_path: Path) -> None:
    room = str(tmp_path / "room")
    async with fleet(tmp_path / "logs", fake("A", "--room", room), fake("B", "--room", room)) as both:
        failure = await both.start_together()
        assert failure is not None
        assert failure.variant == "B"
        first = await both.alone("A")
        assert await both.alone("A") is first
        second = await both.alone("B")
        second.check_alive()
        with pytest.raises(ServerFailedError):
            first.check_alive()
    assert both.starts == 4
    assert os.listdir(tmp_path / "logs")


async def test_the_first_one_must_fit(fake: Fake, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.touch()
    with pytest.raises(ServerFailedError, match="out of memory"):
        async with fleet(tmp_path, fake("A", "--room", str(room)), fake("B")) as both:
            await both.start_together()
