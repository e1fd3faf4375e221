"""Rows of the benchmark: what they hold; engines of different kinds agree on a pair; long contexts' arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checks import check_repeatability
from benchmarks.engine import main
from benchmarks.engines import Mode, Setup, open_engine
from benchmarks.engines.specserve import Sequel
from benchmarks.long_context import decode_bytes, decode_seconds, measure_long, prefill_flops
from benchmarks.shapes import SHAPES, load_settings

KEYS = {"engine", "mode", "batch", "inp", "out", "decode_ms_per_tok", "prefill_s", "total_s", "out_tok_s", "load_s"}
ABOUT = {"commit", "date", "torch", "triton", "driver", "device", "dtype", "draft_dtype", "twin"}


def test_a_row_says_what_was_measured_and_where(pair: Path, tmp_path: Path) -> None:
    results = tmp_path / "new" / "rows.jsonl"
    asked = f"{pair} --mode lora2_spec2,lora0_spec0 --batches 1,2 --inp 12 --out 6 --device cpu --results {results}"
    assert main(asked.split()) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["mode"], row["batch"]) for row in rows] == [
        ("lora2_spec2", 1), ("lora2_spec2", 2), ("lora0_spec0", 1), ("lora0_spec0", 2)
    ]  # fmt: skip
    for row in rows:
        assert row.keys() >= KEYS | ABOUT
        assert row["prefill_s"] > 0
        assert row["out_tok_s"] == pytest.approx(row["batch"] * 6 / row["total_s"], rel=0.05)
        assert row["decode_ms_per_tok"] == pytest.approx((row["total_s"] - row["prefill_s"]) / 5 * 1e3, abs=0.1)
    assert rows[0]["draft"] == "tiny" and rows[2]["draft"] is None


def test_engines_agree_on_a_pair_with_adapters(twin: Path) -> None:
    outputs = {}
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15], [3, 1, 4, 1, 5]]
    for name in ("specserve", "transformers"):
        engine = open_engine(name, Setup(twin, Mode(2, 0), "cpu", "float32"))
        try:
            outputs[name] = engine.generate(prompts, ["a0", "a1", None], 8)
        finally:
            engine.close()
    assert outputs["specserve"] == outputs["transformers"]


def test_modes_read_as_they_are_written() -> None:
    for text in ("lora0_spec0", "lora8_spec4", "lora32_specauto"):
        assert str(Mode.parse(text)) == text
    assert Mode.parse("lora2_spec0").adapters(3) == ["a0", "a1", "a0"]
    with pytest.raises(SystemExit):
        Mode.parse("lora8")


def test_repeatability_is_reported(pair: Path) -> None:
    engine = open_engine("specserve", Setup(pair, Mode(2, 0), "cpu", "float32"))
    try:
        found = check_repeatability(engine, Mode(2, 0), 1000, batch=4, alone=2)
    finally:
        engine.close()
    assert (found["identical"], found["alone_equal"]) == (True, 1.0)


def test_costs_of_a_long_context() -> None:
    shape = SHAPES["8b"]
    assert shape.linear_weights == pytest.approx(7.5e9, rel=0.01)
    assert shape.kv_values * 2 == 128 * 1024  # bytes a token, bf16
    assert decode_bytes(shape, 8, 32768, 2) == pytest.approx(15.0e9 + 8 * 32768 * 131072, rel=0.01)
    attention = 2 * 32768**2 * 32 * 128 * 32  # two products, half of the square
    assert prefill_flops(shape, 32768) == pytest.approx(2 * 6.98e9 * 32768 + attention, rel=0.01)


def test_decode_is_timed_while_all_decode() -> None:
    early, late = Sequel(arrivals=[0.0, 1.0, 2.0, 2.5, 3.0]), Sequel(arrivals=[2.0, 2.5, 3.0, 9.0, 10.0])
    assert decode_seconds([early, late]) == pytest.approx(0.5)


def test_long_context_is_measured(pair: Path) -> None:
    found = measure_long(Setup(pair, Mode(0, 0), "cpu", "float32"), load_settings(pair), context=160)
    assert isinstance(found["decode_ms_per_tok"], float) and found["decode_ms_per_tok"] > 0
