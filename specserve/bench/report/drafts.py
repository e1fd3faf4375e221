"""Which drafts are accepted: by position in a round, and by adapter."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specserve.bench.acceptance import Acceptance, acceptance, by_adapter
from specserve.bench.records import Comparison, RequestRecord
from specserve.bench.report.theme import MARKERS, Palette, Picture, canvas, legend

SHOWN = 16  # adapters: those with the most drafts
BASE = "(base model)"


def drafts(comparison: Comparison) -> list[Picture]:
    return [*_by_position(comparison), *_by_adapter(comparison)]


def succeeded(comparison: Comparison, variant: str) -> list[RequestRecord]:
    runs = [run for run in comparison.runs if run.variant == variant]
    return [record for run in runs for record in run.requests if record.error is None]


def _by_position(comparison: Comparison) -> list[Picture]:
    found = {info.variant: acceptance(succeeded(comparison, info.variant)) for info in comparison.variants}
    if not any(found.values()):
        return []

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, POSITIONS, 4.8, 3.6)
        for (name, one), colour, marker in zip(found.items(), palette.series, MARKERS, strict=False):
            if one is not None:
                places = range(1, len(one.drafted) + 1)
                label = f"{name}: {one.length:.2f} tokens a round"
                axes.plot(
                    places, one.per_position, color=colour, marker=marker, markersize=6, linewidth=2.0, label=label
                )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("position of the draft in its round")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        legend(axes, palette, 1)
        return figure

    return [Picture("acceptance-position", POSITIONS, "Of the rounds that drafted so far, those that kept it.", draw)]


POSITIONS = "Drafts accepted by position"
ADAPTERS = "Drafts accepted by adapter"


def _by_adapter(comparison: Comparison) -> list[Picture]:
    found = {info.variant: by_adapter(succeeded(comparison, info.variant)) for info in comparison.variants}
    drafted: dict[str | None, int] = {}
    for one in found.values():
        for name, counts in one.items():
            drafted[name] = drafted.get(name, 0) + sum(counts.drafted)
    names = sorted(drafted, key=lambda name: -drafted[name])[:SHOWN]
    shown = {variant: one for variant, one in found.items() if one}
    if len(names) < 2:
        return []

    def draw(palette: Palette, *, narrow: bool = False) -> Figure:
        figure, (axes,) = canvas(palette, ADAPTERS, 4.8, 1.3 + (0.12 + 0.2 * len(shown)) * len(names))
        colours = dict(zip(found, palette.series, strict=False))
        width = 0.78 / len(shown)
        for place, (variant, one) in enumerate(shown.items()):
            rates = [_rate(one.get(name)) for name in names]
            up = [row + (place - (len(shown) - 1) / 2) * width for row in range(len(names))]
            bars = axes.barh(up, rates, 0.86 * width, color=colours[variant], label=variant)
            axes.bar_label(bars, [f"{rate:.0%}" for rate in rates], color=palette.ink, fontsize=8, padding=3)
        axes.set_yticks(range(len(names)), [name or BASE for name in names], color=palette.ink)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.08)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if len(shown) > 1:
            legend(axes, palette)
        return figure

    more = "" if len(drafted) <= SHOWN else f" The {SHOWN} of {len(drafted)} with the most drafts."
    return [Picture("acceptance-adapter", ADAPTERS, f"Accepted drafts of all drafts.{more}", draw)]


def _rate(one: Acceptance | None) -> float:
    return 0.0 if one is None else one.rate
