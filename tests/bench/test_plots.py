"""Plots: which rows they show, that the same rows give the same file, and that both pages can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots.__main__ import main
from benchmarks.plots.adapters import cost
from benchmarks.plots.adapters import read as read_adapters
from benchmarks.plots.speculation import by_mode, read, speedup
from benchmarks.plots.style import INK, LOOKS

ABOUT = {"pair": "tiny", "draft": "tiny", "inp": 8, "out": 4, "device": "none", "commit": "0", "sampling": "greedy"}


def row(section: str, batch: int, alpha: float, **more: Any) -> dict[str, Any]:
    values = {"adapters": "none", "mode": "draft", "k": "auto", "twin": None}
    return ABOUT | values | {"section": section, "batch": batch, "alpha": alpha} | more


def curve(batch: int, alpha: float, speedup: float, **more: Any) -> dict[str, Any]:
    return row("curve", batch, alpha, speedup=speedup, k_mean=1.0, **more)


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_the_last_right_row_of_a_cell_counts(tmp_path: Path) -> None:
    wrong, right = {"passed": False}, {"passed": True}
    rows = [curve(1, 0.3, 1.1), curve(2, 0.3, 1.2), curve(1, 0.3, 1.3, twin=right), curve(2, 0.3, 9.0, twin=wrong)]
    (line,) = speedup(read(written(tmp_path, rows))).axes[0].get_lines()[2:]  # the first two are at 1 and 0.98
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2], [1.3, 1.2])
    assert line.get_label() == "α = 0.3"


def test_bars_are_modes_without_fixed_numbers() -> None:
    rows = [
        row("modes", 8, 0.8, mode=mode, k=k, decode_ms_per_tok=ms)
        for mode, k, ms in (("base", 0, 4.0), ("draft", "auto", 2.0), ("draft", 3, 9.0), ("both", "auto", 3.0))
    ]
    heights = [bar.get_height() for bar in by_mode(rows).axes[0].patches]
    assert heights == [4.0, 2.0, 3.0]


def test_files_are_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = written(tmp_path, [curve(batch, alpha, 1.0 + alpha) for batch in (1, 2) for alpha in (0.3, 0.9)])
    for folder in ("one", "other"):
        assert main(["--results", str(rows), "--out", str(tmp_path / folder)]) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["speculation-drafts.svg", "speculation-speedup.svg"]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)
    assert "not drawn, there are no rows of modes" in capsys.readouterr().out
    assert main(["--results", str(tmp_path / "none.jsonl")]) == 1


def test_what_adapters_add_is_over_the_base(tmp_path: Path) -> None:
    about = {"pair": "tiny", "inp": 8, "out": 4, "device": "none", "commit": "0", "batch": 8, "ranks": [8, 64]}
    cells = {"base": (4.0, 0.0, 0.0), "8 of rank 64": (5.0, 1.0, 0.7), "8 of rank 8": (4.2, 0.2, 0.1)}
    rows = [
        about | {"section": "ranks", "cell": cell, "decode_ms_per_tok": ms, "cost_ms": more, "floor_ms": floor}
        | {"decode_of_base": ms / 4.0} for cell, (ms, more, floor) in cells.items()
    ]  # fmt: skip
    loading = {"section": "loading", "twin": None}
    path = written(tmp_path, [*rows, rows[1] | {"decode_ms_per_tok": 9.0, "twin": {"passed": False}}, loading])
    axes = cost(read_adapters(path)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "8 at once, 8 of rank 8",
        "8 at once, 8 of rank 64",
    ]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([4.0, 4.0, 0.1, 0.7, 0.1, 0.3])  # the base, bytes, the rest
    assert main(["--results", str(path), "--out", str(tmp_path / "out")]) == 0
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["adapters-cost.svg"]


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_colours_stand_out_on_both_pages(page: str) -> None:
    for colour in (INK, *(look.colour for look in LOOKS)):
        low, high = sorted((luminance(colour), luminance(page)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, colour  # what WCAG asks of graphics
