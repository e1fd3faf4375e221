"""Pictures and tables of the comparisons over HTTP: README and the documentation say what the kept rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import http_pictures, http_tables
from benchmarks.http_rows import FOLDERS, read, read_alone

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_kept_comparisons_are_of_two_servers_at_the_same_rates() -> None:
    adapters, draft = (read(folder) for folder in FOLDERS)
    assert (adapters.what, draft.what) == ("8 adapters", "8 adapters, a draft model")
    assert adapters.titles == draft.titles == ("vLLM 0.26", "specserve")
    assert adapters.rates == draft.rates


def test_the_texts_have_the_rows_figures() -> None:
    """Where rows were measured anew, `python -m benchmarks.http_tables` prints what belongs there."""
    kept = [read(folder) for folder in FOLDERS]
    readme, performance = ((ROOT / name).read_text() for name in ("README.md", "docs/performance.md"))
    assert "\n".join(http_tables.short(kept)) in readme
    assert "\n".join(http_tables.full(kept)) in performance
    assert "\n".join(http_tables.against_better(kept, read_alone())) in performance


def test_the_better_of_two_figures_counts() -> None:
    row = {"of_a": 20.0, "of_b": 4.0, "speedup": 5.0}
    (one,) = [read(FOLDERS[0])]
    ratios = {(2.0, metric): row for metric in http_tables.SHORT}
    alone = {(one.what, 2.0): {"median_ttft_ms": 10, "median_tpot_ms": 30}}
    figures = replace(one, rates=(2.0,), ratios=ratios)
    assert list(http_tables.against_better([figures], alone))[-1] == "| 2 | 10, 2.50× | 30, 5.00× | –, 5.00× |"


def test_figures_have_three_digits() -> None:
    assert [http_tables.value(figure) for figure in (6850.7, 170.5, 24.46, 4.358)] == ["6,851", "170", "24.5", "4.36"]
    assert http_tables.speedup({"speedup": 5.698, "low": None}) == "5.70"
    assert http_tables.speedup({"speedup": 1.25, "low": 0.96, "high": 1.4}) == "1.25 (0.96–1.40)"


def test_pictures_are_drawn_for_both_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert http_pictures.main(["--out", str(tmp_path)]) == 0
    names = ["http-answers-dark.png", "http-answers.png", "http-metrics-dark.png", "http-metrics.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4
    assert len(capsys.readouterr().out.split()) == 4


@pytest.mark.parametrize("command", [http_pictures, http_tables])
def test_nothing_to_tell_of_is_told(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().out
    assert command.main(["benchmarks/results/ab-cpu"]) == 1  # which varies how many requests run at a time
    assert "nothing by requests a second" in capsys.readouterr().out
