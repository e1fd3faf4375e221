"""What adapters cost: time per output token with several of them, or of higher rank, beside that with the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from specserve.bench.compare import varied
from specserve.bench.metrics import summarise
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison, Load, RunRecord
from specserve.bench.report.axis import is_number, load_axis
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas, legend
from specserve.bench.words import load_name, number

VARIED = ("adapters", "rank")
MOST = 6  # lines; of more, each variant's last one, of the most of what else was varied
Points = list[tuple[float, float]]  # times a token, over that at the line's first point


class Line(NamedTuple):
    name: str
    points: Points  # of all rounds together
    rounds: list[Points]  # of each


def overhead(comparison: Comparison) -> list[Picture]:
    """One picture for each of VARIED that was."""
    names = varied(run.load for run in comparison.runs)
    return [picture for axis in VARIED if axis in names for picture in _picture(comparison, axis)]


def lines(comparison: Comparison, axis: str) -> list[Line]:
    """A line for each variant and choice of what else was varied, from two points on."""
    found: list[list[Line]] = []
    rest = [name for name in varied(run.load for run in comparison.runs) if name != axis]
    for info in comparison.variants:
        groups: dict[tuple[tuple[str, float | int | str], ...], list[tuple[Load, list[RunRecord]]]] = {}
        own = [run for run in comparison.runs if run.variant == info.variant and is_number(run.load.get(axis))]
        for load, runs in by_load(own):
            groups.setdefault(tuple((name, load[name]) for name in rest if name in load), []).append((load, runs))
        own_lines = [
            Line(
                ", ".join(part for part in (info.variant, load_name(dict(others))) if part),
                _points(axis, loads),
                _rounds(axis, loads),
            )
            for others, loads in groups.items()
        ]
        found.append([line for line in own_lines if len(line.points) > 1])
    every = [line for own_lines in found for line in own_lines]
    return every if len(every) <= MOST else [own_lines[-1] for own_lines in found if own_lines]


def _rounds(axis: str, loads: Sequence[tuple[Load, list[RunRecord]]]) -> list[Points]:
    """Each round over its own first point: how steady the line is, whatever all loads of a round share."""
    numbers = sorted({run.round for _, runs in loads for run in runs})
    rounds = [[(load, [run for run in runs if run.round == number]) for load, runs in loads] for number in numbers]
    found = [_points(axis, one) for one in rounds]
    return [points for points in found if len(points) == len(loads) > 1]


def _points(axis: str, loads: Sequence[tuple[Load, list[RunRecord]]]) -> Points:
    times = [(float(load[axis]), summarise(runs).tpot) for load, runs in loads]
    known = sorted((at, tpot.mean) for at, tpot in times if tpot is not None and tpot.mean > 0)
    return [(at, mean / known[0][1]) for at, mean in known]


def _picture(comparison: Comparison, axis: str) -> list[Picture]:
    drawn = lines(comparison, axis)
    if not drawn:
        return []
    title = "What adapters cost" if axis == "adapters" else "What rank costs"

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, title, NARROW if narrow else 9.4, 3.7)
        for line, colour, marker in zip(drawn, palette.series, MARKERS, strict=False):
            for points in line.rounds:
                axes.plot(*zip(*points[1:], strict=True), ".", color=colour, markersize=5, alpha=0.4)
            look = {"color": colour, "marker": marker, "label": line.name}
            axes.plot(*zip(*line.points, strict=True), **look, markersize=6, linewidth=2.0)  # type: ignore[arg-type]
            axes.annotate(
                f"{line.points[-1][1]:.2f}×", line.points[-1], (7, 0), textcoords="offset points", va="center",
                color=colour, fontsize=8.5, fontweight="bold",
            )  # fmt: skip
        axes.margins(x=0.07)
        axes.axhline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
        load_axis(axes, axis, [at for line in drawn for at, _ in line.points])
        axes.set_ylabel("mean TPOT, relative")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
        legend(axes, palette, 2 if narrow else MOST)
        return figure

    least = number(min(at for line in drawn for at, _ in line.points))
    of = f"{least} adapters" if axis == "adapters" else f"rank {least}"
    caption = f"Mean time per output token, over that of the same variant at {of}: 1.05× is 5 % dearer. Dots: rounds."
    return [Picture(f"overhead-{axis}", title, caption, draw, wide=True)]
