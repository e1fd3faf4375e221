"""Ends a server whose owner died without a word, as of SIGKILL: a process that waits for the end of a pipe.

The owner holds the only writing end, which the system closes however the owner dies. Processes are ended as families:
the session that one leads, and its descendants, which may have left for sessions of their own. The guard is this very
file, run with the standard library alone (`python -I -S`), so that it is there at once and costs next to nothing while
others are measured.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

POLL_SECONDS = 0.1


class Guard:
    """The owner's side. It is started before what it guards, and ends with its owner or when it is dismissed."""

    def __init__(self, grace: float) -> None:
        """`grace`: seconds between SIGTERM and SIGKILL. Raises OSError."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(grace)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what the terminal sends is not for it
        )

    def watch(self, pid: int) -> None:
        """End the session that this process leads, and its descendants, should we die."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            self._process.stdin.write(f"{pid} {began(pid)}\n".encode())
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """What it guarded is gone, or is to stay."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def descendants(pid: int) -> dict[int, str]:
    """{pid: when it began} of all processes below one, where the system has /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            children.setdefault(int(_stat(path)[1]), []).append(int(path.parent.name))
    found: list[int] = [pid]
    for parent in found:  # which grows on the way
        found += children.get(parent, [])
    return {child: began(child) for child in found[1:]}


def began(pid: int) -> str:
    """With the id it names a process for good, whatever becomes of the number; "" if there is none, or no /proc."""
    try:
        return _stat(Path(f"/proc/{pid}/stat"))[19]
    except (OSError, IndexError):
        return ""


def _stat(path: Path) -> list[str]:
    """The fields after the command's name, which may hold anything: state, parent, …"""
    return path.read_text(errors="replace").rpartition(")")[2].split()


def signal_session(pid: int, number: int) -> bool:
    """To the session that the process leads, if it is there."""
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def kill_those(family: Mapping[int, str]) -> None:
    """Of {pid: when it began} those that are still the same."""
    for pid, since in family.items():
        if since and began(pid) == since:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _end(pid: int, since: str, grace: float) -> None:
    """SIGTERM, and SIGKILL for what is left after the grace."""
    if began(pid) not in (since, ""):
        return  # the number is another's by now
    family = descendants(pid)
    end = time.monotonic() + grace
    signal_session(pid, signal.SIGTERM)
    while _lives(pid) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    signal_session(pid, signal.SIGKILL)
    kill_those(family)


def _lives(pid: int) -> bool:
    """Of a session's leader; once it is gone, or without /proc, whether the session has anybody. Nobody may have asked
    yet how a process ended that is an orphan."""
    try:
        return _stat(Path(f"/proc/{pid}/stat"))[0] != "Z"
    except (OSError, IndexError):
        return signal_session(pid, 0)


def main() -> None:
    for line in sys.stdin.read().splitlines():  # the pipe's end
        pid, _, since = line.partition(" ")
        _end(int(pid), since, float(sys.argv[1]))


if __name__ == "__main__":
    main()
