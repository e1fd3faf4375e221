"""Speedups as points with their bounds, above and below 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from specserve.bench.report.theme import Palette
from specserve.bench.stats import Ratio

WIDE = 4  # the greatest over the least, from which on the axis is logarithmic


def draw_points(axes: Axes, points: Sequence[tuple[float, Ratio]], look: dict[str, str]) -> None:
    loads, values = zip(*((load, ratio.speedup) for load, ratio in points), strict=True)
    bounded = [(load, ratio.speedup, ratio.bounds) for load, ratio in points if ratio.bounds is not None]
    for load, value, (low, high) in bounded:
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([load], [value], yerr=reach, color=look["color"], elinewidth=1.6, capsize=3.5, linestyle="none")
    axes.plot(loads, values, **look, markersize=6.5, linewidth=2.0)  # type: ignore[arg-type]


def name_points(axes: Axes, palette: Palette, points: Sequence[tuple[float, Ratio]]) -> None:
    for load, ratio in points:
        place = (load, ratio.bounds[1] if ratio.bounds else ratio.speedup)
        axes.annotate(
            f"{ratio.speedup:.2f}×", place, (0, 4), textcoords="offset points", ha="center", color=palette.ink,
            fontsize=8.5, fontweight="bold",
        )  # fmt: skip


def halves(
    axes: Axes, palette: Palette, names: tuple[str, str], ratios: Sequence[Ratio], places: tuple[float, float]
) -> None:
    """Which side of 1 is whose; the axis always has room for both, and above for a number below the name.

    `places` on the horizontal axis have room to say so: below, then above.
    """
    ends = [end for ratio in ratios for end in (ratio.speedup, *(ratio.bounds or ()))]
    low, high = min(0.9, *ends), max(1.1, *ends)
    if high > WIDE * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        low, high = low * (low / high) ** 0.06, high * (high / low) ** 0.16
    else:
        low, high = low - 0.06 * (high - low), high + 0.16 * (high - low)
    axes.set_ylim(low, high)
    axes.axhspan(1.0, high, color=palette.win, alpha=0.06, linewidth=0, zorder=0)
    axes.axhspan(low, 1.0, color=palette.lose, alpha=0.06, linewidth=0, zorder=0)
    look: dict[str, Any] = {"textcoords": "offset points", "xycoords": ("data", "axes fraction"), "fontsize": 8.5}
    axes.annotate(f"▲ {names[1]} wins", (places[1], 1), (0, -5), ha="center", va="top", color=palette.win, **look)
    axes.annotate(f"▼ {names[0]} wins", (places[0], 0), (0, 5), ha="center", va="bottom", color=palette.lose, **look)
