"""Plot of benchmarks/adapters.py: what a token takes without adapters, and what their number and ranks add to that.

Of several rows of one cell the last one counts. Rows that failed the twin are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.plots.style import INK, LOOKS, canvas

Row = dict[str, Any]
SECTIONS = ("mixes", "ranks")
BASE = "base"  # the cell without adapters
FAINT = 0.55  # of INK's bars: what adapters add is to stand out


def read(path: Path) -> list[Row]:
    """The last row of each cell with adapters that was right, least batch and least cost first."""
    found: dict[tuple[int, str], Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row.get("section") in SECTIONS and row["cell"] != BASE and (row.get("twin") or {"passed": True})["passed"]:
            found[row["batch"], row["cell"]] = row
    return sorted(found.values(), key=lambda row: (row["batch"], row["decode_ms_per_tok"]))


def cost(rows: Sequence[Row]) -> Figure:
    """Bars of ms a token: the base's, what reading the adapters' bytes takes at least, the rest of what they add."""
    first, commits = rows[0], sorted({row["commit"] for row in rows})
    size = f"{first['inp']} prompt and {first['out']} new tokens"
    about = f"{first['pair']}, {size}; {first['device']}, {', '.join(commits)}"
    title, height = "What adapters cost, by their number and rank", 1.5 + 0.26 * len(rows)
    figure, axes = canvas(title, about, "ms a token", "", height)
    places = range(len(rows))
    parts = {
        "without adapters": ([row["decode_ms_per_tok"] - row["cost_ms"] for row in rows], INK, FAINT),
        "their bytes, at the device's rate": ([row["floor_ms"] for row in rows], LOOKS[0].colour, 1.0),
        "the rest of what they add": ([row["cost_ms"] - row["floor_ms"] for row in rows], LOOKS[1].colour, 1.0),
    }
    left = [0.0] * len(rows)
    for name, (values, colour, alpha) in parts.items():
        axes.barh(places, values, 0.7, left=left, color=colour, alpha=alpha, label=name)
        left = [begin + value for begin, value in zip(left, values, strict=True)]
    for place, end, row in zip(places, left, rows, strict=True):
        axes.annotate(
            f"{row['decode_of_base']:.2f}×", (end, place), (4, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_yticks(places, [f"{row['batch']} at once, {named(row)}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(left))
    axes.grid(visible=False, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, labelcolor=INK)
    return figure


def named(row: Row) -> str:
    """A mix's cell is named by its popularity alone, which tells nothing of one adapter."""
    if row["section"] == "ranks":
        return str(row["cell"])
    number = f"{row['live_adapters']} of rank {row['ranks'][0]}"
    return number if row["live_adapters"] == 1 else f"{number} ({row['cell']})"


PLOTS: dict[str, tuple[Sequence[str], Callable[[Sequence[Row]], Figure]]] = {"adapters-cost": (SECTIONS, cost)}
"""File's name → the sections whose rows it shows, and what draws it."""
