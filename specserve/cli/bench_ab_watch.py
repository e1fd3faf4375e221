"""Watching a comparison: a bar on a terminal, and signals that end it in order."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from specserve.bench.ab import Outcome
from specserve.bench.plan import load_name
from specserve.bench.turns import Turn

BAR = "{desc} |{bar:20}| {n_fmt}/{total_fmt} requests {elapsed}<{remaining}"


class Progress:
    """A bar on a terminal; what takes a while without requests is a line, wherever it goes."""

    def __init__(self) -> None:
        # disable=None: shown on a terminal alone.
        self._bar = tqdm(bar_format=BAR, disable=None, leave=False, total=0)
        self._rounds = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def told(self, line: str) -> None:
        tqdm.write(f"{line}…" if line[-1] not in ".)" else f"{line} …", file=sys.stderr)

    def planned(self, turns: Sequence[Turn], requests: int) -> None:
        self._bar.reset(total=requests)
        self._rounds = max(turn.round for turn in turns) + 1

    def began(self, turn: Turn) -> None:
        what = "warm-up" if turn.warm_up else f"round {turn.round + 1}/{self._rounds}"
        self._bar.set_description_str(f"{turn.variant}, {load_name(turn.load)}, {what}")

    def request_ended(self) -> None:
        self._bar.update()


async def until_signalled(comparison: Coroutine[Any, Any, Outcome]) -> Outcome:
    """The outcome; a signal cancels the comparison, which then stops its servers and tells what it has."""
    task: asyncio.Task[Outcome] = asyncio.create_task(comparison)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
