"""Draws README's pictures of the comparisons over HTTP that are kept, each for light and for dark pages.

    python -m benchmarks.http_pictures [ADAPTERS DRAFT] [--out docs/images]

http-answers: what a whole answer takes, from the two servers. http-metrics: how many times as good the second one is in
single metrics, the worst ones among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.http_rows import FOLDERS, Figures, read
from specserve.bench.report.theme import MARKERS, Palette, Picture, canvas, legend, save_pngs
from specserve.bench.words import metric_name
from specserve.core.errors import InvalidRequestError

OUT = Path("docs/images")
ANSWER = "mean_e2el_ms"
METRICS = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms", "output_throughput")
WIDTH, BAR = 9.4, 0.38  # inches; of a rate's place
STEP = 0.19  # between two rates of a metric
SEEN = 0.5, 11.0  # of speedups; bounds may reach further
TICKS = (0.5, 1, 2, 3, 5, 10)


def pictures(kept: Sequence[Figures]) -> list[Picture]:
    return [_answers(kept), _metrics(kept)]


def _answers(kept: Sequence[Figures]) -> Picture:
    a, b = kept[0].titles
    gains = [one.ratios[rate, ANSWER]["speedup"] for one in kept for rate in one.rates]
    title = f"On one {kept[0].device} {b} answers {min(gains):.1f} to {max(gains):.1f} times as fast as {a}"

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, found = canvas(palette, title, WIDTH, 3.8, len(kept))
        top = max(one.ratios[rate, ANSWER]["of_a"] for one in kept for rate in one.rates) / 1000
        for axes, one in zip(found, kept, strict=True):
            _bars(axes, palette, one)
            axes.set_ylim(0, 1.12 * top)
            axes.set_title(one.what, loc="right", color=palette.ink)
        found[0].set_ylabel("mean seconds of a whole answer")
        legend(found[0], palette)
        return figure

    return Picture("http-answers", title, "", draw)


def _bars(axes: Axes, palette: Palette, one: Figures) -> None:
    for side, (name, of) in enumerate(zip(one.titles, ("of_a", "of_b"), strict=True)):
        rows = [one.ratios[rate, ANSWER] for rate in one.rates]
        places = [place + BAR * (side - 0.5) for place in range(len(rows))]
        axes.bar(places, [row[of] / 1000 for row in rows], BAR, color=palette.series[side], label=name)
        for place, row in zip(places, rows, strict=True):
            top = place, row[of] / 1000
            look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(f"{top[1]:.1f} s", top, (0, 2), color=palette.muted, fontsize=8, **look)
            if side:
                colour = palette.win if row["speedup"] > 1 else palette.lose
                axes.annotate(
                    f"{row['speedup']:.1f}×", top, (0, 12), color=colour, fontsize=10, fontweight="bold", **look
                )
    axes.set_xticks(range(len(one.rates)), [f"{rate:g}" for rate in one.rates])
    axes.set_xlabel("requests/s sent")
    axes.grid(visible=False, axis="x")


def _metrics(kept: Sequence[Figures]) -> Picture:
    a, b = kept[0].titles
    gains = [one.ratios[rate, metric]["speedup"] for one in kept for rate in one.rates for metric in METRICS]
    title = f"How many times as good {b} is as {a}, by metric: {min(gains):.2f} to {max(gains):.2f}"

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, found = canvas(palette, title, WIDTH, 4.6, len(kept))
        for axes, one in zip(found, kept, strict=True):
            _points(axes, palette, one)
            axes.set_title(one.what, loc="left", color=palette.ink)
            axes.set_xlabel(f"← {a} wins · {b} wins →  (lines: 95 % bounds)")
        for axes in found[1:]:
            axes.set_yticklabels([])
        figure.legend(
            *found[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
            labelcolor=palette.ink, fontsize=9, handletextpad=0.2,
        )  # fmt: skip
        return figure

    return Picture("http-metrics", title, "", draw)


def _points(axes: Axes, palette: Palette, one: Figures) -> None:
    """Metrics from the top down, and in each the rates; the figures stand on the right."""
    for number, rate in enumerate(one.rates):
        colour, marker = palette.series[number + 1], MARKERS[number]
        places = [-metric - STEP * (number - (len(one.rates) - 1) / 2) for metric in range(len(METRICS))]
        rows = [one.ratios[rate, metric] for metric in METRICS]
        axes.plot(
            [row["speedup"] for row in rows], places, linestyle="none", color=colour, marker=marker,
            label=f"{rate:g} requests/s",
        )  # fmt: skip
        for place, row in zip(places, rows, strict=True):
            if row["low"] is not None:
                seen = max(row["low"], SEEN[0]), min(row["high"], SEEN[1])
                axes.plot(seen, (place, place), color=colour, linewidth=1.8)
            axes.annotate(
                f"{row['speedup']:.2f}×", (1.0, place), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center", color=palette.ink, fontsize=8,
            )  # fmt: skip
    axes.axvline(1.0, color=palette.ink, linewidth=1.1, zorder=1.5)
    axes.axvspan(1.0, SEEN[1], color=palette.win, alpha=0.06, linewidth=0, zorder=0)
    axes.axvspan(SEEN[0], 1.0, color=palette.lose, alpha=0.06, linewidth=0, zorder=0)
    axes.set_xscale("log")
    axes.set_xlim(*SEEN)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_yticks([-metric for metric in range(len(METRICS))], [metric_name(name) for name in METRICS])
    axes.tick_params(axis="y", labelcolor=palette.ink)
    axes.grid(visible=False, axis="y")


def draw(folders: Sequence[Path], out: Path) -> list[Path]:
    """Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = pictures([read(folder) for folder in folders])
    return [path for picture in drawn for path in save_pngs(picture, out, picture.name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there is nothing to draw from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=FOLDERS)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        paths = draw(args.folders, args.out)
    except InvalidRequestError as error:
        print(error)
        return 1
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
