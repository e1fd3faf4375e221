"""How many times as fast a token comes, by how many drafts are accepted."""

from __future__ import annotations

from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from specserve.bench.compare import Compared
from specserve.bench.gains import gains
from specserve.bench.records import Comparison
from specserve.bench.report.bounds import draw_points, halves, name_points
from specserve.bench.report.theme import MARKERS, NARROW, Palette, Picture, canvas, file_part, legend
from specserve.bench.words import load_name

SHOWN = 3  # loads in one picture: the least, the middle one, the most


def speedup_by_acceptance(comparison: Comparison, compared: Compared, place: int) -> list[Picture]:
    """`place`: B's among the variants, which its colour goes by."""
    a, b = compared.a.variant, compared.b.variant
    drafter, found = gains(comparison.runs, a, b, compared.confidence)
    if not found:
        return []
    shown = found if len(found) <= SHOWN else [found[0], found[len(found) // 2], found[-1]]
    first = place % len(MARKERS) if len(shown) == 1 else 1
    known = [point for _, points in shown for point in points]
    gap = max(pairwise(sorted(alpha for alpha, _ in known)), key=lambda ends: ends[1] - ends[0])
    title = f"Speedup of {b} by how many drafts are accepted"

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, title, NARROW if narrow else 9.4, 3.7)
        axes.axhline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
        for (load, points), colour, marker in zip(shown, palette.series[first:], MARKERS[first:], strict=False):
            draw_points(axes, points, {"color": colour, "marker": marker, "label": load_name(load)})
            if len(shown) == 1:
                name_points(axes, palette, points)
        middle = sum(gap) / 2
        halves(axes, palette, (a, b), [ratio for _, ratio in known], (middle, middle))
        axes.set_xlabel("α, the share of drafts that are accepted")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        if len(shown) > 1:
            legend(axes, palette, 2 if narrow else SHOWN)
        return figure

    caption = (
        f"Requests by the share of {drafter}'s drafts that were accepted, in groups of one size. Mean TPOT of {a} over "
        f"that of {b}, with {100 * compared.confidence:g} % bounds. Requests without drafts are left out."
    )
    return [Picture(f"alpha-{file_part(b)}", title, caption, draw, wide=True)]
