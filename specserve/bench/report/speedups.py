"""How many times as fast one variant is as the other: over the load, or of each metric where there is one load."""

from __future__ import annotations

from math import prod

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from specserve.bench.compare import Compared, along
from specserve.bench.report.axis import load_axis, main_axis
from specserve.bench.report.bounds import draw_points, halves, name_points
from specserve.bench.report.tables import SHOWN
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas, file_part, legend
from specserve.bench.stats import Ratio
from specserve.bench.verdict import outcome
from specserve.bench.words import load_name, metric_name, number


def speedups(compared: Compared, place: int) -> list[Picture]:
    """`place`: B's among the variants, which its colour goes by."""
    axis = main_axis(at.load for at in compared.loads)
    return _by_metric(compared) if axis is None else _over_load(compared, axis, place)


def _over_load(compared: Compared, axis: str, place: int) -> list[Picture]:
    groups = [(load_name(others), [at for at in group if at.headline]) for others, group in along(compared.loads, axis)]
    groups = [(name, group) for name, group in groups if group]
    if not groups:
        return []
    a, b = compared.a.variant, compared.b.variant
    title, known = f"How many times as fast {b} is as {a}", [at for _, group in groups for at in group]
    first = place % len(MARKERS) if len(groups) == 1 else 1

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, title, NARROW if narrow else 9.4, 3.7)
        axes.axhline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
        for (name, group), colour, marker in zip(groups, palette.series[first:], MARKERS[first:], strict=False):
            points = [(float(at.load[axis]), at.headline) for at in group if at.headline is not None]
            draw_points(axes, points, {"color": colour, "marker": marker, "label": name})
            if len(groups) == 1:
                name_points(axes, palette, points)
        load_axis(axes, axis, [float(at.load[axis]) for at in known])
        ratios = [at.headline for at in known if at.headline is not None]
        halves(axes, palette, (a, b), ratios, _between(axes))
        for others, one in compared.break_evens:
            if one.axis == axis and one.load is not None and not others:
                axes.axvline(one.load, color=palette.muted, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
                _note(
                    axes, palette, one.load, f"break-even at about {number(round(one.load, 1 if one.load < 10 else 0))}"
                )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        if len(groups) > 1:
            legend(axes, palette, 2 if narrow else 4)
        return figure

    caption = f"Mean E2EL of {a} over that of {b}, with {100 * compared.confidence:g} % bounds."
    return [Picture(f"speedup-{file_part(compared.b.variant)}", title, caption, draw, wide=True)]


def _by_metric(compared: Compared) -> list[Picture]:
    if not compared.loads:
        return []
    (at,) = compared.loads[:1]
    found = [at.ratios[metric] for metric in SHOWN if metric in at.ratios]
    if not found:
        return []
    a, b = compared.a.variant, compared.b.variant
    title = f"How many times as fast {b} is as {a}, or as much it serves"

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, title, NARROW if narrow else 9.4, 1.1 + 0.36 * len(found))
        for place, ratio in enumerate(reversed(found)):
            _bar(axes, palette, place, ratio)
        axes.axvline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
        axes.set_yticks(range(len(found)), [metric_name(ratio.metric) for ratio in reversed(found)], color=palette.ink)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"← {a} wins · {b} wins →")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        return figure

    caption = f"With {100 * compared.confidence:g} % bounds; hollow marks: too few requests for bounds."
    return [Picture(f"speedup-{file_part(compared.b.variant)}", title, caption, draw, wide=True)]


def _bar(axes: Axes, palette: Palette, place: int, ratio: Ratio) -> None:
    colour = {"faster": palette.win, "slower": palette.lose}.get(outcome(ratio), palette.muted)
    if ratio.bounds is not None:
        axes.plot(ratio.bounds, (place, place), color=colour, linewidth=3.0, solid_capstyle="round")
    face = colour if ratio.bounds is not None else palette.page
    axes.plot(ratio.speedup, place, "o", color=colour, markerfacecolor=face, markersize=7)
    end = ratio.bounds[1] if ratio.bounds else ratio.speedup
    axes.annotate(
        f"{ratio.speedup:.2f}×", (end, place), (9, 0), textcoords="offset points", va="center", color=palette.ink,
        fontsize=8.5,
    )  # fmt: skip


def _between(axes: Axes) -> tuple[float, float]:
    """Between the first two loads and between the last two, where bounds leave room for words."""
    ticks = [float(tick) for tick in axes.get_xticks()]
    ends = ticks[:2], ticks[-2:]
    low, high = ((prod(two) ** 0.5 if axes.get_xscale() == "log" else sum(two) / 2) for two in ends)
    return low, high


def _note(axes: Axes, palette: Palette, load: float, text: str) -> None:
    axes.annotate(
        text, (load, 0.0), (4, 4), xycoords=("data", "axes fraction"), textcoords="offset points",
        color=palette.muted, fontsize=8.5,
    )  # fmt: skip
