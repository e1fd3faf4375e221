"""Corrections: how far the steps that run differ from what the table says they take.

Contexts grow, the host is busy, others use the machine: a step takes longer than its trial did. Most of that has
nothing to do with drafts and is the same milliseconds for every number of them, so differences are added, not
multiplied: of steps that were not seen lately the table then neither flatters nor blackens the ones that were. Steps
are told apart by rows (a power of two each) and draft passes; from numbers of passes that were seen others follow by a
straight line.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from statistics import median

WINDOW = 9  # step times whose median counts: single stalls are none of ours
ENOUGH = 3  # of them, to count at all
TOLERANCE = 0.03  # of a step's time: less is noise, and nobody's choice changes by it
FORGET_AFTER = 2000  # steps: an old impression must not keep the engine from trying again


@dataclass(slots=True)
class _Cell:
    """Steps of about so many rows and so many passes. `value` is what others were told."""

    found: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    value: float | None = None
    seen: int = 0


class Corrections:
    """`version` changes whenever an answer does."""

    def __init__(self) -> None:
        self.version = 0
        self._steps = 0
        self._cells: dict[int, dict[int, _Cell]] = {}  # by rows' bits, then passes

    def observe(self, rows: int, passes: int, table_ms: float, observed_ms: float) -> None:
        """A step took `observed_ms` where the table says `table_ms`."""
        self._steps += 1
        cells = self._cells.setdefault(rows.bit_length(), {})
        cell = cells.get(passes)
        if cell is None:
            cell = cells[passes] = _Cell()
        cell.seen = self._steps
        cell.found.append(observed_ms - table_ms)
        if len(cell.found) >= ENOUGH:
            value = median(cell.found)
            if cell.value is None or abs(value - cell.value) > TOLERANCE * (table_ms + max(0.0, value)):
                cell.value = value
                self.version += 1
        if self._steps % (FORGET_AFTER // 8) == 0:
            self._forget()

    def _forget(self) -> None:
        for cells in self._cells.values():
            for passes in [passes for passes, cell in cells.items() if self._steps - cell.seen > FORGET_AFTER]:
                del cells[passes]
                self.version += 1

    def steps_unseen(self, rows: int, passes: int) -> int:
        """How many steps ago such a step was last seen."""
        cell = self._cells.get(rows.bit_length(), {}).get(passes)
        return self._steps - cell.seen if cell is not None and cell.value is not None else self._steps

    def at(self, rows: int, passes: int) -> float:
        """Milliseconds to add to the table's. Beyond what was seen it goes on as it rose from the fewest passes."""
        cells = self._cells.get(rows.bit_length(), {})
        known = sorted((count, cell.value) for count, cell in cells.items() if cell.value is not None)
        if not known:
            return 0.0
        place = bisect_left(known, (passes,))
        if place < len(known) and (known[place][0] == passes or place == 0):
            return known[place][1]
        (low, low_value) = known[place - 1] if place < len(known) else known[0]
        (high, high_value) = known[min(place, len(known) - 1)]
        if high == low:
            return low_value
        return low_value + (high_value - low_value) * (passes - low) / (high - low)
