"""How plots look: no background of their own, and colours that can be read on a light page and on a dark one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#7d8590"  # text, axes
WIDTH, HEIGHT = 7.2, 4.0  # inches


class Look(NamedTuple):
    """A line's colour and marker; both differ, so that colour alone tells nothing."""

    colour: str
    marker: str


LOOKS = (Look("#3b82f6", "o"), Look("#d97706", "s"), Look("#16a34a", "^"), Look("#a855f7", "D"), Look("#e11d48", "v"))


def canvas(title: str, subtitle: str, across: str, up: str, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure `height` inches high, with one pair of axes; `across` and `up` say what they show."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"{title}\n", loc="left", color=INK, fontweight="bold")
    axes.text(0.0, 1 + 0.03 * HEIGHT / height, subtitle, transform=axes.transAxes, color=INK, fontsize=8)
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    return figure, axes


def lines(axes: Axes, batches: list[int], of: dict[str, list[tuple[int, float]]]) -> None:
    """Values by batch size, which doubles from tick to tick."""
    for (name, points), look in zip(of.items(), LOOKS, strict=False):
        across, up = zip(*points, strict=True)
        axes.plot(across, up, color=look.colour, marker=look.marker, markersize=5, linewidth=1.6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    legend(axes)


def legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "specserve"}):  # the same rows give the same file
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)
