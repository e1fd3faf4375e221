"""Throughput and latency of every variant over the load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from specserve.bench.compare import varied
from specserve.bench.metrics import Summary, summarise
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison, RunRecord
from specserve.bench.report.axis import is_number, load_axis, main_axis
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas, legend
from specserve.bench.words import load_name

Value = Callable[[Summary], float]
PANELS: dict[str, Value] = {
    "output tokens/s": lambda summary: summary.output_throughput,
    "mean E2EL, s": lambda summary: summary.e2el.mean / 1000 if summary.e2el else 0.0,
}


def throughput(comparison: Comparison) -> list[Picture]:
    """Where more than the axis was varied, of the first choice of the rest."""
    axis = main_axis(run.load for run in comparison.runs)
    if axis is None:
        return []
    runs = [run for run in comparison.runs if is_number(run.load.get(axis)) and run.complete]
    rest = [name for name in varied(run.load for run in runs) if name != axis]
    runs = [run for run in runs if all(run.load.get(name) == runs[0].load.get(name) for name in rest)]
    if not any(record.error is None for run in runs for record in run.requests):
        return []
    chosen = load_name({name: runs[0].load[name] for name in rest if name in runs[0].load})
    title = "Throughput and latency under load" + (f", {chosen}" if chosen else "")

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        size = (NARROW, 6.4, 1, len(PANELS)) if narrow else (9.4, 3.8, len(PANELS))
        figure, found = canvas(palette, title, *size)
        for axes, (label, value) in zip(found, PANELS.items(), strict=True):
            for info, colour, marker in zip(comparison.variants, palette.series, MARKERS, strict=False):
                own = [run for run in runs if run.variant == info.variant]
                _line(axes, axis, own, value, {"color": colour, "marker": marker, "label": info.variant})
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            load_axis(axes, axis, [float(run.load[axis]) for run in runs])
        legend(found[0], palette)
        return figure

    caption = "Lines: all rounds of a load together. Dots: its single rounds, and so how steady it was."
    return [Picture("throughput", title, caption, draw, wide=True)]


def _line(axes: Axes, axis: str, runs: Sequence[RunRecord], value: Value, look: dict[str, str]) -> None:
    loads = [(float(load[axis]), group) for load, group in by_load(runs)]
    if loads:
        dots = [(load, value(summarise([run]))) for load, group in loads for run in group]
        axes.plot(*zip(*dots, strict=True), ".", color=look["color"], markersize=5, alpha=0.4)
        line = [(load, value(summarise(group))) for load, group in loads]
        axes.plot(*zip(*line, strict=True), **look, markersize=6, linewidth=2.0)  # type: ignore[arg-type]
