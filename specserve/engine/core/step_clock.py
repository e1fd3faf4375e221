"""How long steps take while the engine is busy."""

from __future__ import annotations

import time
from collections.abc import Callable


class StepClock:
    """With steps in flight one behind the other, a step's time is that between its end and the end before it: what the
    device or the host needs for a step, whichever is slower."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last: float | None = None

    def ended(self) -> float | None:
        """A step's result has come: milliseconds since the one before; None if the engine was idle in between."""
        now, last = self._clock(), self._last
        self._last = now
        return None if last is None else 1000.0 * (now - last)

    def idle(self) -> None:
        """Nothing runs now."""
        self._last = None
