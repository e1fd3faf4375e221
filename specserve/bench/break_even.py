"""The load at which B stops winning, between those that were measured.

From the least load at which B wins on, the first where it no longer does; between two loads the logarithm of the
speedup is taken to be linear in the logarithm of the load. Its bounds are percentiles over redrawn speedups, each about
its own estimate with its own error: loads were measured in runs of their own.

What it says agrees with what is said of single loads: there is something to stop only where B wins at one at least, its
bounds leaving out 1, and B "still wins" at the highest load only where they do so there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from specserve.bench.stats import Ratio

REDRAWN = 2000


class BreakEven(msgspec.Struct, frozen=True, omit_defaults=True):
    """`kind`: B stops winning `at` a load, or still wins at the highest (`beyond`), or wins and was not found to stop
    (`open`), or wins nowhere and loses somewhere (`never`), or neither (`no difference`)."""

    axis: str  # what was varied, say concurrency
    kind: Literal["at", "beyond", "open", "never", "no difference"]
    lowest: float
    highest: float
    load: float | None = None  # of "at"
    low: float | None = None  # None: it may be at or below the lowest measured
    high: float | None = None  # None: it may be beyond the highest measured
    bounded: bool = False  # False: there is too little to say between what loads it lies
    wins: float | None = None  # the highest load at which B was found to win; None: none


def break_even(
    axis: str, points: Sequence[tuple[float, Ratio]], confidence: float = 0.95, seed: int = 0
) -> BreakEven | None:
    """`points`: loads above 0 and what was measured there. None: fewer than two loads have no load between them."""
    ordered = sorted(points, key=lambda point: point[0])
    loads = np.array([load for load, _ in ordered])
    if len(loads) < 2 or loads[0] <= 0:
        return None
    ends = float(loads[0]), float(loads[-1])
    bounds = [ratio.bounds for _, ratio in ordered]
    if not any(_won(one) for one in bounds):
        lost = any(one is not None and one[1] < 1 for one in bounds)
        return BreakEven(axis, "never" if lost else "no difference", *ends)
    logs = np.log([[ratio.speedup for _, ratio in ordered]])
    (found,) = crossings(loads, logs)
    wins = max(float(load) for load, one in zip(loads, bounds, strict=True) if _won(one))
    low = high = None
    bounded = all(one is not None for one in bounds)
    if bounded:
        drawn = logs + _errors([ratio for _, ratio in ordered], np.random.default_rng(seed))
        tails = ((1 - confidence) / 2, (1 + confidence) / 2)
        low, high = (
            _measured(float(value)) for value in np.quantile(crossings(loads, drawn), tails, method="inverted_cdf")
        )
    if np.isfinite(found):
        return BreakEven(axis, "at", *ends, float(found), low, high, bounded, wins)
    kind: Literal["beyond", "open"] = "beyond" if _won(bounds[-1]) else "open"
    return BreakEven(axis, kind, *ends, None, low, high, bounded, wins)


def crossings(loads: npt.NDArray[np.float64], logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`logs` [draws, loads] of speedups → [draws]: where B stops winning; 0: it wins nowhere; inf: up to the end."""
    wins = logs > 0
    begun = np.logical_or.accumulate(wins, axis=1)
    stops = begun[:, :-1] & wins[:, :-1] & ~wins[:, 1:]  # [draws, loads - 1]
    place = stops.argmax(axis=1)
    rows = np.arange(len(logs))
    before, after = logs[rows, place], logs[rows, place + 1]
    stop = stops.any(axis=1)
    share = np.divide(before, before - after, out=np.zeros(len(logs)), where=stop)
    found = np.exp(np.log(loads[place]) + share * np.log(loads[place + 1] / loads[place]))
    return np.where(stop, found, np.where(begun[:, -1], np.inf, 0.0))


def _errors(ratios: Sequence[Ratio], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """[draws, loads] of log speedups; Student's, as their bounds are."""
    columns = [
        (ratio.error or 0.0) * random.standard_t(1e9 if ratio.freedom is None else ratio.freedom, REDRAWN)
        for ratio in ratios
    ]
    return np.stack(columns, axis=1)


def _won(bounds: tuple[float, float] | None) -> bool:
    return bounds is not None and bounds[0] > 1


def _measured(load: float) -> float | None:
    return load if 0 < load < np.inf else None
