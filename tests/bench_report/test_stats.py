"""Intervals: against scipy on known distributions, and against the truth of a fake that is run two hundred times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from specserve.bench.metrics import Slos
from specserve.bench.pairs import pair
from specserve.bench.records import Event, RequestRecord, RunRecord
from specserve.bench.resampling import Sample, draw
from specserve.bench.stats import QUANTILES, Ratio, ratios
from specserve.bench.verdict import outcome

TRIALS = 200
LEAST, MOST = (int(bound) for bound in scipy_stats.binom.ppf((0.001, 0.999), TRIALS, 0.95))  # of intervals that hold


def found(runs: list[RunRecord], **more: Any) -> dict[str, Ratio]:
    return {one.metric: one for one in ratios(pair(runs, "A", "B"), **more)}


def one_round(a: np.ndarray, b: np.ndarray) -> list[RunRecord]:
    """E2EL as given, in seconds; no tokens."""
    sides = {"A": a, "B": b}
    return [
        RunRecord(name, 0, {}, 1.0, [RequestRecord(index, 0.0, [], float(end)) for index, end in enumerate(ends)])
        for name, ends in sides.items()
    ]


def test_the_error_of_a_ratio_of_means_is_that_of_scipys_paired_bootstrap() -> None:
    random = np.random.default_rng(1)
    a = random.lognormal(0, 0.6, 150)
    b = a * random.lognormal(-0.2, 0.3, 150)
    ours = found(one_round(a, b))["mean_e2el_ms"]

    def log_ratio(left: np.ndarray, right: np.ndarray, axis: int) -> np.ndarray:
        return np.log(right.mean(axis) / left.mean(axis))

    settings = {"paired": True, "vectorized": True, "n_resamples": 4000, "method": "percentile", "rng": 2}
    theirs = scipy_stats.bootstrap((a, b), log_ratio, **settings)
    assert ours.error == pytest.approx(theirs.standard_error, rel=0.12)
    bounds = (np.log(ours.low), np.log(ours.high))
    assert bounds == pytest.approx(tuple(theirs.confidence_interval), abs=0.3 * theirs.standard_error)
    assert ours.ratio == pytest.approx(b.mean() / a.mean())
    assert ours.one_round


@pytest.mark.parametrize(("metric", "quantile"), [("median_e2el_ms", 0.5), ("p90_e2el_ms", 0.9)])
def test_the_error_of_a_ratio_of_quantiles_is_the_textbooks(metric: str, quantile: float) -> None:
    """Of independent lognormal samples: √2 · √(p(1 − p)/n) / φ(z) · σ."""
    size, sigma, z = 400, 0.5, scipy_stats.norm.ppf(quantile)
    expected = np.sqrt(2 * quantile * (1 - quantile) / size) / scipy_stats.norm.pdf(z) * sigma
    errors = []
    for seed in range(20):
        a, b = np.random.default_rng(seed).lognormal(0, sigma, (2, size))
        errors.append(found(one_round(a, b))[metric].error)
    assert np.mean(errors) == pytest.approx(expected, rel=0.1)


def test_bounds_of_a_throughput_are_those_of_a_t_test_over_rounds() -> None:
    random = np.random.default_rng(3)
    rates = 10 * np.exp(random.normal((0, 0.2), 0.01, (6, 2)))  # [rounds, variants]
    request = RequestRecord(0, 0.0, [], 1.0, output_tokens=50)
    runs = [
        RunRecord(name, number, {}, 50 / rates[number, side], [request])
        for number in range(6) for side, name in enumerate("AB")
    ]  # fmt: skip
    ours = found(runs)["output_throughput"]
    logs = np.log(rates[:, 1] / rates[:, 0])
    theirs = scipy_stats.ttest_1samp(logs, 0).confidence_interval()
    assert ours.freedom == pytest.approx(5)
    assert (np.log(ours.low), np.log(ours.high)) == pytest.approx((theirs.low, theirs.high), abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize("same_trace", [True, False], ids=["same requests in all rounds", "each round its own"])
@pytest.mark.parametrize("speedup", [1.25, 1.0], ids=["1.25 times as fast", "A against A"])
def test_intervals_hold_the_truth_as_often_as_they_say(
    fake: Callable[..., Any], same_trace: bool, speedup: float
) -> None:
    """Under drift between rounds, correlation within runs and requests that gain differently."""
    one = fake(speedup=speedup, same_trace=same_trace, requests=30)
    held: dict[str, int] = {}
    told: dict[str, int] = {}
    for seed in range(TRIALS):
        both = found(one.runs(seed))
        for metric, ratio in both.items():
            low, high = ratio.bounds or (np.nan, np.nan)
            held[metric] = held.get(metric, 0) + (low <= speedup <= high)
        said = outcome(both["mean_e2el_ms"])
        told[said] = told.get(said, 0) + 1
    for metric in ("mean_e2el_ms", "mean_ttft_ms", "mean_tpot_ms", "mean_itl_ms", "output_throughput"):
        assert LEAST <= held[metric] <= MOST, metric
    for metric in ("median_e2el_ms", "median_ttft_ms", "median_tpot_ms", "p90_e2el_ms"):
        assert held[metric] >= LEAST, metric
    if speedup == 1.0:
        assert LEAST <= told["no difference"] <= MOST
    else:
        assert told == {"faster": TRIALS}


def test_drift_that_both_share_does_not_widen_bounds_but_noise_of_whole_runs_does(fake: Callable[..., Any]) -> None:
    quiet = {"drift": 0.0, "block": 0.0, "rounds": 8}

    def width(**noise: float) -> float:
        ratio = found(fake(**(quiet | noise)).runs(5))["mean_e2el_ms"]
        return float(np.log(ratio.high / ratio.low))

    assert width(drift=0.5) < 1.5 * width()
    assert width(block=0.1) > 3 * width()


def test_requests_that_gain_differently_widen_bounds_though_rounds_agree(fake: Callable[..., Any]) -> None:
    """The same trace in every round: without resampling requests, bounds would hold for this trace alone."""
    values = {"block": 0.0, "noise": 0.001, "drift": 0.0, "rounds": 8}
    ratio = found(fake(request=0.3, **values).runs(6))["mean_e2el_ms"]
    assert np.log(ratio.high / ratio.low) > 0.1
    assert ratio.low < 1 / 1.25 < ratio.high


def test_the_same_runs_give_the_same_bounds(fake: Callable[..., Any]) -> None:
    assert ratios(pair(fake().runs(7), "A", "B")) == ratios(pair(fake().runs(7), "A", "B"))


def test_speedups_are_above_one_where_b_wins(fake: Callable[..., Any]) -> None:
    both = found(fake(block=0.001, request=0.001, noise=0.001).runs(8), slos=Slos(e2el=500))
    for metric in ("median_ttft_ms", "output_throughput"):
        low, high = both[metric].bounds
        assert 1.2 < low < both[metric].speedup < high < 1.3
    assert both["median_ttft_ms"].ratio < 1 < both["output_throughput"].ratio
    assert both["request_goodput"].speedup > 1


def test_without_enough_requests_there_are_no_bounds(fake: Callable[..., Any]) -> None:
    few = found(fake(rounds=3, requests=3).runs(9))
    assert all(ratio.bounds is None for metric, ratio in few.items() if metric.endswith("_ms"))
    some = found(fake(rounds=4, requests=20).runs(9))
    assert some["p90_e2el_ms"].bounds is not None
    assert some["p99_e2el_ms"].bounds is None
    assert some["p99_e2el_ms"].ratio > 0
    assert outcome(some["p99_e2el_ms"]) == "too few"


def test_one_round_bounds_latencies_alone_and_says_so(fake: Callable[..., Any]) -> None:
    both = found(fake(rounds=1).runs(10))
    assert both["mean_e2el_ms"].bounds is not None
    assert both["mean_e2el_ms"].one_round
    assert both["output_throughput"].bounds is None


def test_runs_that_lack_a_side_or_failed_give_no_ratio(fake: Callable[..., Any]) -> None:
    runs = fake().runs(11)
    assert ratios(pair([], "A", "B")) == []
    assert ratios(pair([run for run in runs if run.variant == "A"], "A", "B")) == []
    broken = [RequestRecord(index, 0.0, [], 1.0, error="refused") for index in range(20)]
    assert ratios(pair([RunRecord(name, 0, {}, 1.0, broken) for name in "AB"], "A", "B")) == []


def test_requests_that_failed_on_one_side_are_no_pair(fake: Callable[..., Any]) -> None:
    a, b = fake(rounds=1).runs(12)
    error = RequestRecord(0, 1.0, [], 100.0, error="the connection broke")
    broken = RunRecord(b.variant, 0, b.load, b.duration, [error, *b.requests[1:]], complete=False)
    pairs = pair([a, broken], "A", "B") if a.variant == "A" else pair([broken, a], "A", "B")
    assert len(pairs.both) == 39
    assert sum(pairs.failed) == 1
    assert pairs.blocks == []  # the run was cut short, so its throughput tells nothing


def test_answers_without_gaps_have_no_bounds_rather_than_infinite_ones() -> None:
    events = [Event(0.5, 1), Event(0.5, 1)]
    records = [RequestRecord(index, 0.0, events, 0.5) for index in range(20)]
    both = found([RunRecord(name, 0, {}, 1.0, records) for name in "AB"])
    assert "mean_itl_ms" not in both
    assert both["mean_ttft_ms"].bounds == (1.0, 1.0)


def test_logs_of_a_resample_are_close_to_those_of_its_own_figures() -> None:
    """The smooth quantile of a resample beside the one that is looked up in its values, one by one."""
    random = np.random.default_rng(13)
    rows = [list(random.lognormal(0, 0.4, random.integers(1, 9))) for _ in range(300)]
    sample, weights = Sample.of(rows, [*QUANTILES.values()]), draw(np.arange(300), 200, random)
    looked_up = []
    for drawn in weights.astype(int):
        values = [value for row, times in zip(rows, drawn, strict=True) for value in row * times]
        looked_up.append(np.log([np.mean(values), *np.quantile(values, [*QUANTILES.values()])]))
    ours, theirs = sample.logs(weights), np.array(looked_up)
    assert ours[:, 0] == pytest.approx(theirs[:, 0])
    for column in (1, 2):  # median and p90; beyond p99 a resample of 1,350 values has thirteen
        assert np.corrcoef(ours[:, column], theirs[:, column])[0, 1] > 0.9
        assert ours[:, column].std() == pytest.approx(theirs[:, column].std(), rel=0.2)


def test_groups_are_drawn_as_wholes() -> None:
    groups = np.array([0, 0, 1, 2, 2, 2])
    weights = draw(groups, 50, np.random.default_rng(14))
    assert weights.shape == (50, 6)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(axis=1) == 3).all()
