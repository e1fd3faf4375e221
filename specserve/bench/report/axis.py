"""The horizontal axis of what changes with the load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from specserve.bench.compare import varied
from specserve.bench.records import Load

AXES = {
    "concurrency": "requests at a time", "rate": "requests/s sent", "adapters": "adapters", "rank": "rank of adapters",
}  # fmt: skip
"""What may be varied; the first that was is the horizontal axis."""
DOUBLING = 4  # a factor between least and most, above which the axis is logarithmic


def main_axis(loads: Iterable[Load]) -> str | None:
    """What was varied, being numbers; None: nothing was."""
    known = list(loads)
    numbers = [name for name in varied(known) if len({load[name] for load in known if is_number(load.get(name))}) > 1]
    return next((name for name in (*AXES, *numbers) if name in numbers), None)


def is_number(value: float | int | str | None) -> bool:
    return isinstance(value, int | float)


def load_axis(axes: Axes, axis: str, loads: Sequence[float]) -> None:
    """Its ticks are the loads that were measured."""
    ticks = sorted(set(loads))
    if ticks[0] > 0 and ticks[-1] > DOUBLING * ticks[0]:
        axes.set_xscale("log", base=2)
        axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(AXES.get(axis, axis))
