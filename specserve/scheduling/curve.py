"""Curve: a measured, monotone function of one number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate


class Curve:
    """Straight lines through measured points (x, y ≥ 0), never falling: more work is not done in less time, and where a
    measurement says so it is noise, so a point is lifted to the one before it.

    Before the first point it is flat; behind the last one it goes on with the slope of the last line.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        found = sorted(points)
        assert found, "a curve needs a point"
        self._xs = [x for x, _ in found]
        self._ys = list(accumulate((max(0.0, y) for _, y in found), max))

    def __call__(self, x: float) -> float:
        xs, ys = self._xs, self._ys
        if x <= xs[0] or len(xs) == 1:
            return ys[0]
        right = min(bisect_right(xs, x), len(xs) - 1)
        left = right - 1
        slope = (ys[right] - ys[left]) / (xs[right] - xs[left])
        return ys[left] + slope * (x - xs[left])

    def __repr__(self) -> str:
        return f"Curve({[(x, round(y, 4)) for x, y in zip(self._xs, self._ys, strict=True)]})"
