"""Mixes are what their names say, collections of adapters share files where they may, and streams are timed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.adapter_mixes import Mix, shares, zipf
from benchmarks.adapter_setup import Adapters, Bench
from benchmarks.adapter_streams import Stream, forget, latencies, percentile, random_prompts, run_closed, tier_of
from benchmarks.pair import weight_sources

ALL = ("base", "identical", "distinct", "uniform", "skewed", "zipf1.0", "zipf1.5")


def counts(name: str, batch: int, loras: int = 128) -> list[int]:
    """How many requests each adapter has, the most popular first."""
    return sorted(Counter(Mix(name, loras).adapters(batch)).values(), reverse=True)


def test_mixes_of_a_batch() -> None:
    assert Mix("base", 128).adapters(3) == [None] * 3
    assert Mix("identical", 128).adapters(3) == ["a0"] * 3
    assert sorted(Counter(Mix("distinct", 128).adapters(128)).values()) == [1] * 128
    assert counts("uniform", 32) == [6, 6, 5, 5, 5, 5]
    assert counts("uniform", 16) == [4] * 4
    assert counts("skewed", 32) == [11, 7, 5, 3, 2, 1, 1, 1, 1]
    for name in ALL:
        for batch in (1, 8, 32, 128):
            adapters = Mix(name, 128).adapters(batch)
            assert len(adapters) == batch
            assert adapters == Mix(name, 128).adapters(batch)
    assert Mix("distinct", 32).adapters(32) != [f"a{number}" for number in range(32)]  # in no order


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SystemExit, match="distinct"):
        Mix("distinct", 4).adapters(5)
    with pytest.raises(SystemExit, match=r"zipf1\.0"):
        Mix("zipfian", 4).adapters(5)


@pytest.mark.parametrize("s", [0.0, 1.0, 1.5])
def test_zipf_draws_follow_the_law(s: float) -> None:
    draws = Counter(zipf(100_000, 50, s, random.Random(3)))
    norm = sum((number + 1) ** -s for number in range(50))
    for number in (0, 1, 4, 20):
        assert draws[number] / 100_000 == pytest.approx((number + 1) ** -s / norm, abs=0.005)
    assert max(draws) < 50


def test_shares_add_up() -> None:
    assert shares([2, 1, 1], 4) == [0, 0, 1, 2]
    assert Counter(shares([1.0] * 3, 10)) == {0: 4, 1: 3, 2: 3}


def test_adapters_of_one_rank_share_files() -> None:
    assert weight_sources([4, 8, 4, 8, 4, 4], 2) == [0, 1, 2, 3, 0, 2]
    assert weight_sources([4, 4], None) == [0, 1]


def test_a_collection_is_of_its_ranks_and_every_adapter_its_own(pair: Path) -> None:
    adapters = Adapters("mixed", (2, 3) * 9)
    setup = Bench(pair, None, "cpu", (1,), 8, 2, lambda row: None).setup(pair, adapters, slots=2, host_share=0.5)
    assert adapters.facts["weights"] == "16 files under 18 names"
    assert len({path.stat().st_ino for path in (pair / "mixed").glob("*/adapter_model.safetensors")}) == 16
    configs = {path.read_text() for path in (pair / "mixed").glob("*/adapter_config.json")}
    assert len(configs) == 18
    for name, rank in (("a0", 2), ("a17", 3)):
        assert json.loads((pair / "mixed" / name / "adapter_config.json").read_text())["r"] == rank
        tensors = load_file(pair / "mixed" / name / "adapter_model.safetensors")
        assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {rank}
    assert setup.loras["a17"] == pair / "mixed" / "a17"
    assert (setup.options["max_loras"], setup.options["max_lora_rank"]) == (2, 3)
    assert setup.options["max_host_lora_bytes"] > 9 * 2.5 * 4 * load_rank_one(pair)


def load_rank_one(pair: Path) -> int:
    """Weights of an adapter of rank 1."""
    tensors = load_file(pair / "mixed" / "a0" / "adapter_model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values()) // 2


def test_streams_know_where_their_adapters_were(pair: Path) -> None:
    engine = Bench(pair, None, "cpu", (1,), 8, 2, lambda row: None).open(Adapters("mixed", (2, 3) * 9), slots=2)
    try:
        prompts = random_prompts(4, 8, 1000)
        streams = run_closed(engine, prompts, ["a0", None, "a0", "a1"], 5, streams=1)
        assert [stream.tier for stream in streams] == ["disk", "", "device", "disk"]
        for stream in streams:
            assert len(stream.arrivals) == 5 and len(stream.gaps()) == 4
            assert stream.first_token > 0
        run_closed(engine, prompts[:1], ["a2"], 1, streams=1)
        assert (tier_of(engine, "a0"), tier_of(engine, "a1")) == ("host", "device")
        forget(engine, "a1")
        assert tier_of(engine, "a1") == "disk"
    finally:
        engine.close()


def test_gaps_are_those_of_the_window() -> None:
    stream = Stream(None, "", 0.0, [1.0, 2.0, 4.0, 7.0])
    assert stream.gaps() == [1.0, 2.0, 3.0]
    assert stream.gaps(1.5, 4.0) == [2.0]


def test_percentiles_are_values_that_were_seen() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], percent) for percent in (1, 50, 51, 99, 100)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert latencies("itl", [0.001, 0.003]) == {"itl_mean_ms": 2.0, "itl_p50_ms": 1.0, "itl_p99_ms": 3.0}
    assert latencies("ttft", []) == {"ttft_mean_ms": None, "ttft_p50_ms": None, "ttft_p99_ms": None}
