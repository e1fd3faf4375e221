"""Speculation's benchmark on a tiny pair: every section runs, its rows add up, and its arithmetic is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines.specserve import Sequel
from benchmarks.speculation import main
from benchmarks.speculation_curve import compared
from benchmarks.speculation_runs import Cell, Timed, drafting
from benchmarks.speculation_setup import Bench, Clock
from benchmarks.speculation_shift import Seen, rate_of, settled
from specserve.core.messages import SpeculationStats

OPTIONS = '{"num_blocks":2000}'
ABOUT = {"commit", "date", "torch", "device", "pair", "dtype", "draft", "draft_dtype", "alpha", "k", "twin", "load_s"}


def rows_of(asked: str, folder: Path) -> list[dict[str, Any]]:
    results = folder / "rows.jsonl"
    assert main(f"{asked} --device cpu --results {results} --options {OPTIONS}".split()) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert all(row.keys() >= ABOUT for row in rows)
    return rows


def test_modes_by_number_of_drafts(pair: Path, twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = f"{pair} --twin {twin} --section modes --batches 2 --inp 12 --out 64 --ks 4"
    rows = rows_of(asked, tmp_path)
    assert [(row["mode"], row["adapters"], row["k"]) for row in rows] == [
        ("base", "none", 0), ("draft", "none", "auto"), ("adapters", "plain", 0),
        ("both, no companions", "plain", "auto"), ("both", "companions", "auto"), ("draft", "none", 4),
        ("both", "companions", 4),
    ]  # fmt: skip
    controls = {"none": 1, "plain": 2, "companions": 3}  # a page; adapters; companions
    for row in rows:
        twins = row["twin"]["forced"] if row["k"] == "auto" else row["twin"]
        assert row["twin"]["passed"]
        assert len(twins["controls_failed"]) == controls[row["adapters"]], row
        if row["k"] == 0:
            assert (row["k_mean"], row["tokens_per_round"], row["draft_dtype"]) == (0.0, 1.0, None)
        else:
            assert twins["accepted"] > 0, "the twin must know accepted drafts too"
    four = rows[5]
    assert four["k_mean"] == pytest.approx(4.0, abs=0.3)  # near the end there is room for fewer
    assert four["tokens_per_round"] == pytest.approx(1 + four["accepted_share"] * four["k_mean"], abs=0.2)
    assert four["accepted_per_position"] == sorted(four["accepted_per_position"], reverse=True)
    assert four["ms_per_round"] == pytest.approx(four["decode_ms_per_tok"] * four["tokens_per_round"], rel=0.01)
    assert four["ms_at_alpha"] == pytest.approx(four["ms_per_round"] / 3.3616, rel=0.01)
    assert "auto of best" in capsys.readouterr().out


def test_sampled_beside_greedy(pair: Path, tmp_path: Path) -> None:
    rows = rows_of(f"{pair} --section sampled --batches 2 --inp 12 --out 24 --sampled-k 2", tmp_path)
    assert [(row["sampling"], row["k"]) for row in rows] == [
        (sampling, k) for k in ("auto", 2) for sampling in ("greedy", "rejection", "coupled")
    ]
    greedy, rejection, coupled = rows[3:]
    for row in (rejection, coupled):
        ratio = row["ms_per_round"] / greedy["ms_per_round"]
        assert row["ms_per_round_of_greedy"] == pytest.approx(ratio, rel=0.01)
        assert row["tokens_per_round"] > 1.2, "drafts are accepted"
    assert greedy["decode_ms_per_tok_of_greedy"] == 1.0


def test_the_curve_goes_over_acceptances(pair: Path, tmp_path: Path) -> None:
    asked = (
        f"{pair} --section curve --curve-batches 1,2 --curve-alphas 0.3,0.9 --curve-inp 12 --curve-out 12 --rounds 2"
    )
    rows = rows_of(asked, tmp_path)
    assert [(row["batch"], row["alpha"]) for row in rows] == [(1, 0.3), (1, 0.9), (2, 0.3), (2, 0.9)]
    for row in rows:
        assert len(row["speedups"]) == row["rounds"] == 2
        assert row["off_tok_s"] == pytest.approx(row["batch"] * 12 / row["off_s"], rel=0.05)
        assert row["auto_tok_s"] == pytest.approx(row["batch"] * 12 / row["auto_s"], rel=0.05)


def test_the_engine_follows_a_shift(pair: Path, tmp_path: Path) -> None:
    asked = f"{pair} --section shift --shift-batches 2 --shift-alphas 0.9:0.3 --shift-inp 12 --shift-before 40"
    (row,) = rows_of(f"{asked} --shift-after 80", tmp_path)
    assert (row["alpha_before"], row["alpha"], len(row["step_ms"])) == (0.9, 0.3, 8)
    assert 80 <= row["tokens"] <= 2 * 80 and row["steps"] <= row["tokens"]
    assert 0.0 < row["rate_after"] <= 1.0


def test_what_there_was_no_time_for_is_told(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rows.jsonl"
    asked = f"{pair} --minutes 0 --device cpu --options {OPTIONS} --section modes,shift --batches 2 --results {results}"
    assert main(asked.split()) == 0
    assert not results.exists()
    assert "There was no time for: base, greedy, batch 2, k = 0; " in capsys.readouterr().out


def test_an_unknown_section_is_refused(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(pair), "--section", "modes,caching"])
    assert "no such section: caching" in capsys.readouterr().err


def test_drafts_are_counted_by_step() -> None:
    stats = SpeculationStats(
        rounds=2, drafted=5, accepted=3, drafted_per_position=[2, 2, 1], accepted_per_position=[2, 1, 0]
    )
    # The first token; a step without drafts; rounds that gave 3 and 2.
    one = Sequel(list(range(7)), arrivals=[0.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0], speculation=stats)
    assert drafting([one, one]) == {
        "k_mean": 1.667, "tokens_per_round": 2.0, "accepted_share": 0.6, "accepted_per_position": [1.0, 0.5, 0.0]
    }  # fmt: skip
    assert drafting([Sequel([1, 2], arrivals=[0.0, 1.0])])["k_mean"] == 0.0


def test_speedup_is_the_median_of_rounds() -> None:
    runs = {
        None: [Timed(2.0, []), Timed(4.0, []), Timed(2.0, [])],
        0.5: [Timed(1.0, []), Timed(2.5, []), Timed(2.0, [])],
    }
    row = compared(0.5, runs, tokens=100)
    assert (row["speedups"], row["speedup"]) == ([2.0, 1.6, 1.0], 1.6)
    assert (row["off_tok_s"], row["auto_tok_s"]) == (50.0, 50.0)


def test_settled_is_where_choices_stay_near_the_best() -> None:
    rates = [1.0, 1.9, 2.0, 1.0]  # 1 and 2 drafts are near enough
    assert rate_of(0.5, rates) == pytest.approx(1.45)
    assert rate_of(3.0, rates) == 1.0
    choices = [0, 1, 0, 0, 0, 2] + [1] * 9 + [0] + [2] * 40
    seen = [Seen(tokens=10 * place, seconds=0.1 * place, drafts=float(k)) for place, k in enumerate(choices)]
    found = settled(seen, rates)
    assert found is not None and found.tokens == 50, "one bad choice in 32 may follow, four may not"
    assert settled(seen[:20], rates) is None, "too few choices to tell"
    assert settled([Seen(1, 0.1, 0.0)] * 60, rates) is None


def test_cells_name_the_adapters_of_their_kind(pair: Path) -> None:
    bench = Bench(pair, None, "cpu", Clock())
    assert Cell("none", 2, None).names(bench.loras) == [None, None]
    assert Cell("companions", 3, None).names(bench.loras) == ["a0", "a1", "a0"]
    assert Cell("plain", 3, 0).names(bench.loras) == ["a2", "a3", "a2"]
    assert [Cell("none", batch, None).forced.drafts for batch in (1, 128, 256)] == [4, 3, 1]
