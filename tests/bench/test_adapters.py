"""The adapters' benchmark on a tiny pair: every section runs, and its rows add up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapter_cells, adapter_loading
from benchmarks.adapter_cells import RANK_ADAPTERS, BatchCell, costs, rank_cells
from benchmarks.adapter_mixes import Mix
from benchmarks.adapter_setup import Adapters, Bench
from benchmarks.adapters import main
from benchmarks.shapes import load_settings

OPTIONS = '{"num_blocks":2000}'
ABOUT = {"commit", "date", "torch", "triton", "device", "pair", "section", "slots", "adapters", "weights"}


def rows_of(asked: str, folder: Path) -> list[dict[str, Any]]:
    results = folder / "rows.jsonl"
    assert main(f"{asked} --device cpu --inp 12 --results {results} --options {OPTIONS}".split()) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert all(row.keys() >= ABOUT for row in rows)
    return rows


def test_mixes_and_prefill_beside_the_base(
    pair: Path, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter_cells, "PREFILL_ROUNDS", 2)
    asked = f"{pair} --twin {twin} --section mixes,prefill --mixes identical,distinct,zipf1.5 --batches 1,4 --out 4"
    rows = rows_of(asked, tmp_path)
    cells = [(row["section"], row["batch"], row["cell"]) for row in rows]
    assert cells == [
        ("mixes", 1, "base"), ("mixes", 1, "identical"), ("mixes", 4, "base"), ("mixes", 4, "identical"),
        ("mixes", 4, "distinct"), ("mixes", 4, "zipf1.5"), ("prefill", 1, "base"), ("prefill", 1, "identical"),
        ("prefill", 4, "base"), ("prefill", 4, "identical"), ("prefill", 4, "distinct"),
    ]  # fmt: skip
    for row in rows:
        assert row["twin"]["passed"]
        controls = {"page_replaced"} | ({"adapters_exchanged"} if row["cell"] != "base" else set())
        assert row["twin"]["controls_failed"].keys() == controls
        assert row["prefill_s"] > 0 and row["prefill_of_base"] > 0
        if row["cell"] == "base":
            assert row["prefill_of_base"] == 1.0
    assert [row["live_adapters"] for row in rows[:5]] == [0, 1, 0, 1, 4]
    out = capsys.readouterr().out
    assert out.count("\nzipf1.5 ") == 1 and out.count("\nidentical ") == 4


def test_ranks_are_held_against_the_bytes_that_they_are(pair: Path, tmp_path: Path) -> None:
    rows = rows_of(f"{pair} --section ranks --out 3", tmp_path)
    shape = load_settings(pair).shape("target")
    ranks = {row["cell"]: row["live_bytes"] // shape.lora_weights(1) // 4 for row in rows}
    assert ranks == {
        "base": 0, "8 of rank 64": 8 * 64, "8 of ranks 8 to 64": 2 * 120, "32 of rank 16": 32 * 16,
        "32 of ranks 8 to 64": 8 * 120,
    }  # fmt: skip
    assert [row["batch"] for row in rows] == [8, 8, 8, 32, 32, 32]


def test_cells_of_ranks_name_adapters_of_these_ranks() -> None:
    found = {cell.name: [RANK_ADAPTERS.ranks[int(name[1:])] for name in cell.adapters if name] for cell in rank_cells()}
    assert found["8 of rank 64"] == [64] * 8
    assert found["32 of rank 16"] == [16] * 32
    assert found["8 of ranks 8 to 64"] == [8, 16, 32, 64] * 2


def test_cost_beyond_the_floor_is_a_share_of_the_base(pair: Path) -> None:
    bench = Bench(pair, None, "cpu", (2,), 12, 4, lambda row: None)
    adapters = Adapters("any", (8, 24))
    base = {"decode_ms_per_tok": 2.0, "prefill_s": 1.0}
    row = {"decode_ms_per_tok": 2.5, "prefill_s": 1.1}
    found = costs(bench, adapters, BatchCell("distinct", 2, Mix("distinct", 2)), row, base)
    live = load_settings(pair).shape("target").lora_weights(32) * 4
    assert (found["live_adapters"], found["live_bytes"]) == (2, live)
    assert (found["cost_ms"], found["decode_of_base"], found["prefill_of_base"]) == (0.5, 1.25, 1.1)
    assert found["over_floor"] == pytest.approx(0.25 - live / 4e12 * 1e3 / 2.0, abs=1e-4)


def test_loading_beside_streams_and_alone(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loading, "ROUNDS", 2)
    rows = rows_of(f"{pair} --section loading --streams 2,3 --seconds 0.8 --every 0.2", tmp_path)
    beside, alone = rows[:6], rows[6:]
    assert [(row["streams"], row["kind"]) for row in beside] == [
        (count, kind) for count in (2, 3) for kind in ("none", "warm", "cold")
    ]
    assert [row["tiers"] for row in beside] == [{}, {"device": 4}, {"disk": 4}] * 2
    for row in beside:
        assert row["gaps"] > row["streams"]
        assert 0 < row["itl_p50_ms"] <= row["itl_p99_ms"] <= row["itl_p100_ms"]
    assert beside[2]["p99_of_warm"] == pytest.approx(beside[2]["itl_p99_ms"] / beside[1]["itl_p99_ms"], rel=0.01)
    assert [row["tier"] for row in alone] == ["device", "host", "disk", "disk, scaled"]
    assert alone[0]["over_device_ms"] == 0.0 and all(row["ttft_p50_ms"] > 0 for row in alone)


def test_many_adapters_on_few_slots(pair: Path, twin: Path, tmp_path: Path) -> None:
    asked = f"{pair} --twin {twin} --section thousand --names 24 --requests 40 --concurrent 4 --slots 4 --answer 4"
    rows = rows_of(asked, tmp_path)
    assert [row["kind"] for row in rows] == ["resident", "host", "quarter"]
    resident, host, quarter = rows
    assert resident["slots"] == resident["named"] > 4 == host["slots"] == quarter["slots"]
    assert resident["found_device"] == 1.0
    assert host["found_disk"] == 0.0 < host["found_host"]
    assert quarter["found_disk"] > 0.0
    assert [resident["reads"], resident["loads"], host["reads"]] == [0, 0, 0]
    assert 0 < host["loads"] <= 40 and 0.0 < host["found_device"] < 1.0
    assert quarter["reads"] > 0 and quarter["evictions_host"] > 0 < quarter["evictions_device"]
    assert quarter["host_bytes"] <= quarter["max_host_bytes"] < resident["max_host_bytes"]
    for row in rows:
        assert row["found_device"] + row["found_host"] + row["found_disk"] == pytest.approx(1.0, abs=1e-3)
        assert row["tok_s"] == pytest.approx(40 * 4 / row["seconds"], rel=0.2)
        assert row["of_resident"] == pytest.approx(row["tok_s"] / resident["tok_s"], rel=0.01)
        assert row["twin"]["passed"]


def test_an_unknown_section_is_refused(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(pair), "--section", "mixes,caching"])
    assert "no such section: caching" in capsys.readouterr().err
