"""What adapters cost: time per output token with several of them, or of higher rank, beside that with the fewest."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from specserve.bench.compare import varied
from specserve.bench.metrics import summarise
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison, Load, RunRecord
from specserve.bench.report.axis import AXES, is_number, load_axis
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas, legend
from specserve.bench.words import load_name, number

VARIED = ("adapters", "rank")
MOST = 6  # lines; of more, each variant's last one, of the most of what else was varied
Line = tuple[str, list[tuple[float, float]]]  # its name; times a token over that at the line's first point


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
            (", ".join(part for part in (info.variant, load_name(dict(others))) if part), _points(axis, loads))
            for others, loads in groups.items()
        ]
        found.append([line for line in own_lines if len(line[1]) > 1])
    every = [line for own_lines in found for line in own_lines]
    return every if len(every) <= MOST else [own_lines[-1] for own_lines in found if own_lines]


def _points(axis: str, loads: Sequence[tuple[Load, list[RunRecord]]]) -> list[tuple[float, float]]:
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
        for (name, points), colour, marker in zip(drawn, palette.series, MARKERS, strict=False):
            look = {"color": colour, "marker": marker, "label": name}
            axes.plot(*zip(*points, strict=True), **look, markersize=6, linewidth=2.0)  # type: ignore[arg-type]
        axes.axhline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
        load_axis(axes, axis, [at for _, points in drawn for at, _ in points])
        axes.set_ylabel("mean TPOT, relative")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
        legend(axes, palette, 2 if narrow else MOST)
        return figure

    least = number(min(at for _, points in drawn for at, _ in points))
    caption = f"Mean time per output token, over that of the same variant at {least} {AXES[axis]}: 1.05× is 5 % dearer."
    return [Picture(f"overhead-{axis}", title, caption, draw, wide=True)]
