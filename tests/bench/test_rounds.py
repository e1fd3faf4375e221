"""Cells by name; and a run of them on a tiny pair."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import rounds
from benchmarks.speculation_runs import Cell


def test_cells_by_name() -> None:
    assert rounds.parse_cells("none:8:auto,companions:1:0") == [Cell("none", 8, None), Cell("companions", 1, 0)]
    with pytest.raises(argparse.ArgumentTypeError, match="companions"):
        rounds.parse_cell("some:1:1")


def test_rows_are_kept_as_they_come(pair: Path, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    rounds.main(f"{pair} --cells companions:2:3,none:1:0 --inp 16 --device cpu --results {results}".split())
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["adapters"], row["k"]) for row in rows] == [("companions", 3), ("none", 0)]
    assert 1.0 < rows[0]["tokens_per_step"] <= 4.0 and rows[1]["tokens_per_step"] == 1.0
