"""As many rounds as fit into the time there is: each is measured whole, or not begun."""

from __future__ import annotations

import time
from collections.abc import Callable

from specserve.bench.turns import WARM_UP, Turn


class Deadline:
    """Asked before each turn; counts from its making. A round is taken to last as long as the longest so far, and the
    first one always begins."""

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = None if minutes is None else now() + 60.0 * minutes
        self._round = WARM_UP
        self._begun = now()
        self._longest = 0.0

    def allows(self, turn: Turn) -> bool:
        """False: the round that this turn begins would end too late. Turns come in the order of their rounds."""
        if turn.round == self._round:
            return True
        now = self._now()
        if self._round != WARM_UP:
            self._longest = max(self._longest, now - self._begun)
        self._round, self._begun = turn.round, now
        return self._end is None or turn.round <= 0 or now + self._longest <= self._end
