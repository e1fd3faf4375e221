"""How times are distributed: the share of requests that took no longer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from specserve.bench.metrics import LATENCIES, timing
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison, Load, RunRecord
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas
from specserve.bench.words import load_name

POINTS = 300  # of a line: a picture needs no more, however many values there are
SHOWN = 3  # loads in one picture: the least, the middle one, the most
WIDE = 12  # a time's p99 over its p1, from which on its axis is logarithmic
FAR = 60  # the same, from which on an axis has fewer numbers
MARKED = (0.5, 0.9, 0.99)
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}

Times = dict[str, list[float]]  # ms, by latency


def latencies(comparison: Comparison) -> list[Picture]:
    names = [info.variant for info in comparison.variants]
    shown = [(load, {name: _times(runs, name) for name in names}) for load, runs in by_load(comparison.runs)]
    shown = _spread(
        [(load, times) for load, times in shown if any(one for side in times.values() for one in side.values())]
    )
    if not shown:
        return []
    kinds = [kind for kind in LATENCIES if any(times[name][kind] for _, times in shown for name in names)]

    wide = {kind for kind in kinds for _, times in shown if _is_wide([times[name][kind] for name in names])}

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        across = min(2, len(kinds)) if narrow else len(kinds)
        rows = -(-len(kinds) // across)  # of a load
        width = NARROW if narrow else 2.5 * len(kinds) + 0.6
        figure, found = canvas(palette, TITLE, width, 2.0 * rows * len(shown) + 0.6, across, rows * len(shown))
        for place, axes in enumerate(found):
            (load, times), column = shown[place // (rows * across)], place % (rows * across)
            if column >= len(kinds):
                axes.set_visible(False)
                continue
            kind = kinds[column]
            _distribution(axes, palette, {name: times[name][kind] for name in names}, logarithmic=kind in wide)
            if narrow or place < len(kinds):
                axes.set_title(f"{TITLES[kind]}, ms", loc="left", color=palette.ink)
            if column % across == 0:
                axes.set_ylabel(load_name(load) or "requests")
            else:
                axes.yaxis.set_major_formatter(NullFormatter())
        figure.legend(
            *found[0].get_legend_handles_labels(), loc="outside lower left" if narrow else "upper right",
            ncols=min(3, len(names)) if narrow else len(names), frameon=False, labelcolor=palette.ink, fontsize=9,
        )  # fmt: skip
        return figure

    return [Picture("latencies", TITLE, CAPTION, draw, wide=True)]


TITLE = "How long requests take"
CAPTION = "Share of requests (of ITL: of gaps) that took no longer; further left is faster. Marks: p50, p90, p99."


def _distribution(axes: Axes, palette: Palette, sides: dict[str, list[float]], *, logarithmic: bool) -> None:
    for (name, values), colour, marker in zip(sides.items(), palette.series, MARKERS, strict=False):
        if values:
            shares = np.unique(np.concatenate([np.linspace(0, 1, POINTS), 1 - np.geomspace(1e-3, 0.05, 30)]))
            axes.plot(np.quantile(values, shares), shares, color=colour, linewidth=1.9)
            marks = np.quantile(values, MARKED)
            axes.plot(marks, MARKED, color=colour, linestyle="none", marker=marker, markersize=4.5)
        axes.plot([], [], color=colour, linewidth=1.9, marker=marker, markersize=5, label=name)  # of the legend
    low, high = _ends([*sides.values()])
    if logarithmic and low > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high > FAR * low else (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(low * 0.85, high * 1.15)
    else:
        axes.set_xlim(0, high * 1.08 or 1)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 0.9, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _ends(sides: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least p1 and the greatest p99.5, outliers being no reason to squeeze the rest; 0 of nothing."""
    known = [np.quantile(values, (0.01, 0.995)) for values in sides if values]
    return (float(min(one[0] for one in known)), float(max(one[1] for one in known))) if known else (0.0, 0.0)


def _is_wide(sides: Sequence[Sequence[float]]) -> bool:
    low, high = _ends(sides)
    return low > 0 and high > WIDE * low


def _times(runs: Sequence[RunRecord], variant: str) -> Times:
    found: Times = {kind: [] for kind in LATENCIES}
    for run in runs:
        for one in (timing(record) for record in run.requests if run.variant == variant and record.error is None):
            values = {"ttft": one.ttft, "tpot": one.tpot, "e2el": one.e2el}
            for kind, value in values.items():
                found[kind] += [] if value is None else [1000 * value]
            found["itl"] += [1000 * gap for gap in one.itl]
    return found


def _spread(loads: list[tuple[Load, dict[str, Times]]]) -> list[tuple[Load, dict[str, Times]]]:
    if len(loads) <= SHOWN:
        return loads
    return [loads[0], loads[len(loads) // 2], loads[-1]]
