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
from specserve.bench.turns import Turn
from specserve.bench.words import load_name

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TICK_SECONDS = 0.5
STARTING = "{desc} {elapsed}"
BAR = "{desc} |{bar:20}| {n_fmt}/{total_fmt} requests {elapsed}<{remaining}"


class Progress:
    """A bar on a terminal; elsewhere a line for each server that is started, and for each round."""

    def __init__(self) -> None:
        # disable=None: shown on a terminal alone.
        self._bar = tqdm(bar_format=STARTING, disable=None, leave=False, total=0)
        self._rounds = 0  # 0: nothing is planned yet
        self._round: str | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def told(self, line: str) -> None:
        self._say(line)
        if not self._rounds:
            self._bar.reset(total=0)  # each start has a time of its own
        self._bar.set_description_str(line)

    def planned(self, turns: Sequence[Turn], requests: int) -> None:
        self._bar.bar_format = BAR
        self._bar.reset(total=requests)
        self._rounds = max(turn.round for turn in turns) + 1

    def began(self, turn: Turn) -> None:
        what = "warm-up" if turn.warm_up else f"round {turn.round + 1}/{self._rounds}"
        if what != self._round:
            self._say(what.capitalize())
            self._round = what
        self._bar.set_description_str(f"{turn.variant}, {load_name(turn.load)}, {what}")

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(f"{line} …", file=sys.stderr, flush=True)

    def request_ended(self) -> None:
        self._bar.update()

    def tick(self) -> None:
        """Let the seconds go on while nothing ends."""
        self._bar.refresh()


async def until_signalled(comparison: Coroutine[Any, Any, Outcome], progress: Progress) -> Outcome:
    """The outcome; a signal cancels the comparison, which then stops its servers and tells what it has."""
    task: asyncio.Task[Outcome] = asyncio.create_task(comparison)
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=TICK_SECONDS)
            progress.tick()
        return task.result()
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
