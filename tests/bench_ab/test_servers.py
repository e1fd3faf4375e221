"""Servers start, tell why they do not, and are gone afterwards, whichever way that comes about."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from specserve.bench import servers
from specserve.bench.fleet import Fleet
from specserve.bench.guard import Guard, descendants, kill_those
from specserve.bench.servers import RunningServer, ServerFailedError, start_server, stop_servers
from specserve.bench.variants import Variant

Fake = Callable[..., Variant]
Gone = Callable[[int], bool]


async def start(variant: Variant, folder: Path, started: list[RunningServer], timeout: float = 120.0) -> RunningServer:
    return await start_server(variant, folder / "log", share=0.5, taken=0.0, timeout=timeout, started=started)


def fleet(folder: Path, *variants: Variant) -> Fleet:
    return Fleet(variants, folder, start_timeout=120.0, told=lambda line: None)


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


async def test_a_server_that_is_killed_has_not_said_why(fake: Fake, tmp_path: Path) -> None:
    started: list[RunningServer] = []
    server = await start(fake("A"), tmp_path, started)
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    with pytest.raises(ServerFailedError, match=r"A .* killed by SIGKILL while it was measured: perhaps for lack of m"):
        server.check_alive()
    await stop_servers(started)


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


async def test_a_second_interrupt_cuts_the_grace_short(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "GRACE_SECONDS", 3600.0)
    started: list[RunningServer] = []
    server = await start(fake("A", "--stubborn"), tmp_path, started)
    stopping = asyncio.create_task(stop_servers(started))
    await asyncio.sleep(0.2)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert server.process is not None
    assert server.process.returncode == -9


OWNER = """
import asyncio, sys
from pathlib import Path
from specserve.bench import servers
from specserve.bench.variants import Variant

async def own(folder, *command):
    start = dict(share=0.5, taken=0.0, timeout=60.0, started=[])
    await servers.start_server(Variant("A", "as it is", command=command), Path(folder, "log"), **start)
    print("ready", flush=True)
    await asyncio.sleep(3600)

servers.GRACE_SECONDS = float(sys.argv[1])
asyncio.run(own(*sys.argv[2:]))
"""


@pytest.mark.parametrize(("flag", "grace"), [((), 3600.0), (("--stubborn",), 0.3)])
def test_a_server_ends_with_an_owner_that_is_killed(
    fake: Fake, gone: Gone, tmp_path: Path, flag: tuple[str, ...], grace: float
) -> None:
    """And whom it started, in a session of its own; one that ends when it is asked to needs no grace."""
    command = fake("A", "--child", str(tmp_path / "child"), *flag).command
    words = [sys.executable, "-c", OWNER, str(grace), str(tmp_path), *command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        family = descendants(owner.pid)
        assert int((tmp_path / "child").read_text()) in family
        assert len(family) == 3  # the guard, the server and its child
        owner.kill()
    try:
        assert [pid for pid in family if not gone(pid)] == []
    finally:
        kill_those(family)


async def test_a_guard_goes_with_its_server_and_ends_nothing_else(fake: Fake, gone: Gone, tmp_path: Path) -> None:
    before, started = descendants(os.getpid()), list[RunningServer]()
    server = await start(fake("A"), tmp_path, started)
    assert server.process is not None
    (guarding,) = descendants(os.getpid()).keys() - before.keys() - {server.process.pid}
    await stop_servers(started)
    assert gone(guarding)
    with subprocess.Popen(["sleep", "3600"], start_new_session=True) as other:
        guard = Guard(0.0)
        guard.watch(other.pid)
        guard.dismiss()
        assert other.poll() is None
        other.kill()


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
