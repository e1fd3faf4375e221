"""Plots of benchmarks/speculation.py: speedup under load, milliseconds a token by mode, drafts chosen under load.

Of several rows of one cell the last one counts. Rows that failed the twin are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots.style import INK, LOOKS, canvas, legend, lines

Row = dict[str, Any]
MODES = ("base", "draft", "adapters", "both")  # bars; drafts are the engine's choice
LABELS = {
    "base": "base", "draft": "draft model", "adapters": "adapters", "both": "adapters and companions"
}  # fmt: skip
SECTIONS = ("modes", "sampled", "curve", "shift")
BAR = 0.98  # of the throughput without drafts, that is never to be missed


def read(path: Path) -> list[Row]:
    """The last row of each cell that was right; other benchmarks' rows are left out."""
    found: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row.get("section") in SECTIONS and (row.get("twin") is None or row["twin"]["passed"]):
            kind = [row[name] for name in ("section", "adapters", "batch", "k", "sampling")]
            found[(*kind, row["alpha"], row.get("alpha_before"))] = row
    return list(found.values())


def about(rows: Sequence[Row]) -> str:
    """Where rows come from."""
    first, commits = rows[0], sorted({row["commit"] for row in rows})
    size = f"{first['inp']} prompt and {first['out']} new tokens"
    return f"{first['pair']} with a {first['draft']} draft, {size}; {first['device']}, {', '.join(commits)}"


def speedup(rows: Sequence[Row]) -> Figure:
    """Of the `curve`: throughput with the engine's choice over that without drafts."""
    what = "with drafts / without, prefill included"
    figure, axes = canvas("Throughput with drafts, beside none", about(rows), "requests at once", what)
    axes.axhline(1.0, color=INK, linewidth=1.0)
    axes.axhline(BAR, color=INK, linewidth=0.8, linestyle=":")
    lines(axes, _batches(rows), _by_alpha(rows, "speedup"))
    return figure


def chosen(rows: Sequence[Row]) -> Figure:
    """Of the `curve`: drafts that the engine chose, a step and request."""
    figure, axes = canvas("How many tokens are drafted", about(rows), "requests at once", "drafts a step, mean")
    lines(axes, _batches(rows), _by_alpha(rows, "k_mean"))
    return figure


def by_mode(rows: Sequence[Row]) -> Figure:
    """Of `modes`: milliseconds a token, without fixed numbers of drafts."""
    shown = [row for row in rows if row["mode"] in MODES and row["k"] in (0, "auto")]
    batches, width = _batches(shown), 0.8 / len(MODES)
    figure, axes = canvas("Time for each token of a request", about(shown), "requests at once", "ms a token")
    for place, (mode, look) in enumerate(zip(MODES, LOOKS, strict=False)):
        own = {row["batch"]: row["decode_ms_per_tok"] for row in shown if row["mode"] == mode}
        across = [batches.index(batch) + (place - 1.5) * width for batch in own]
        drawn = axes.bar(across, list(own.values()), 0.92 * width, color=look.colour, label=LABELS[mode])
        axes.bar_label(drawn, fmt="%.1f", color=INK, fontsize=7, padding=1)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    legend(axes)
    return figure


PLOTS: dict[str, tuple[Sequence[str], Callable[[Sequence[Row]], Figure]]] = {
    "speculation-speedup": (("curve",), speedup),
    "speculation-drafts": (("curve",), chosen),
    "speculation-modes": (("modes",), by_mode),
}
"""File's name → the sections whose rows it shows, and what draws it."""


def _batches(rows: Iterable[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _by_alpha(rows: Sequence[Row], value: str) -> dict[str, list[tuple[int, float]]]:
    """A line for each α, over batches."""
    ordered = sorted(rows, key=lambda row: (row["alpha"], row["batch"]))
    found: dict[str, list[tuple[int, float]]] = {}
    for row in ordered:
        found.setdefault(f"α = {row['alpha']}", []).append((row["batch"], row[value]))
    return found
