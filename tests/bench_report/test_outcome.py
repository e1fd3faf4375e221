"""Break-even, equality of answers, and the words of a verdict."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from specserve.bench.ab_text import text
from specserve.bench.break_even import break_even, crossings
from specserve.bench.compare import compare, comparisons, varied
from specserve.bench.equality import equality
from specserve.bench.extra import MissingPackageError, needed
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison, Load, RequestRecord, RunRecord, VariantInfo
from specserve.bench.stats import Ratio
from specserve.bench.verdict import break_even_text, cautions, outcome, verdict
from specserve.bench.words import load_name, load_names


def ratio(speedup: float, error: float | None = 0.01) -> Ratio:
    """Of a latency."""
    if error is None:
        return Ratio("mean_e2el_ms", 1.0, 1 / speedup)
    low, high = np.exp(-np.log(speedup) + 1.96 * error * np.array((-1, 1)))
    return Ratio("mean_e2el_ms", 1.0, 1 / speedup, float(low), float(high), error, 1000.0)


def points(*speedups: float, error: float | None = 0.01) -> list[tuple[float, Ratio]]:
    """At 1, 2, 4, …"""
    return [(2.0**place, ratio(speedup, error)) for place, speedup in enumerate(speedups)]


def test_break_even_is_interpolated_between_loads() -> None:
    found = break_even("concurrency", points(2.0, 1.4, 1.2, 1 / 1.2))
    assert found is not None
    assert (found.kind, found.bounded) == ("at", True)
    assert found.load == pytest.approx(4 * 2**0.5)  # half way between 4 and 8, of logarithms
    assert found.low is not None and found.high is not None
    assert 4 < found.low < found.load < found.high < 8
    assert found.high / found.low == pytest.approx(2 ** (2 * 1.96 * 0.01 * 2**0.5 / 2 / np.log(1.44)), rel=0.1)


@pytest.mark.parametrize(
    ("speedups", "kind", "text"),
    [
        ((1.5, 1.3, 1.2), "beyond", "B still wins at concurrency 4, the highest load measured."),
        ((0.9, 0.8), "never", "B was not found to win at any load measured, from concurrency 1 to concurrency 2."),
        ((1.01, 0.8), "never", "B was not found to win at any load measured, from concurrency 1 to concurrency 2."),
        (
            (1.5, 1.3, 1.005),
            "open",
            "Where B stops winning was not found: it wins at concurrency 2, and neither side was found to win at "
            "concurrency 4, the highest load measured.",
        ),
        ((1.001, 0.999, 1.0), "no difference", "Nobody was found to win at any load measured, from concurrency 1"),
        ((0.8, 1.4, 1.2, 0.8), "at", "B stops winning at about concurrency 5.5 ("),
    ],
)
def test_break_even_beyond_what_was_measured(speedups: tuple[float, ...], kind: str, text: str) -> None:
    found = break_even("concurrency", points(*speedups))
    assert found is not None
    assert found.kind == kind
    assert (found.load is None) == (kind != "at")
    assert break_even_text(found, "B").startswith(text)


def test_break_even_that_may_be_beyond_has_no_upper_bound() -> None:
    found = break_even("rate", points(1.5, 1.2, 0.99, error=0.02))
    assert found is not None
    assert found.low is not None and 2 < found.low < 4
    assert found.high is None
    assert "to beyond 4)" in break_even_text(found, "B")


def test_break_even_needs_two_loads_and_bounds_need_errors() -> None:
    assert break_even("rate", points(1.5)) is None
    found = break_even("rate", [*points(1.5), (2.0, ratio(0.9, None))])
    assert found is not None
    assert (found.kind, found.bounded, found.low, found.high) == ("at", False, None, None)
    found = break_even("rate", points(1.5, 0.9, error=None))
    assert found is not None
    assert found.kind == "no difference"  # without bounds nobody was found to win


def test_crossings_of_many_draws() -> None:
    logs = np.array([[0.2, -0.2, -0.4], [0.1, 0.1, 0.1], [-0.1, -0.1, -0.1], [-0.1, 0.3, -0.1], [0.1, 0.0, -0.1]])
    found = crossings(np.array([1.0, 4.0, 16.0]), logs)
    assert found == pytest.approx([2.0, np.inf, 0.0, 4 * 4**0.75, 4.0])


def answer(index: int, text: str, **more: Any) -> RequestRecord:
    return RequestRecord(index, 0.0, [], 1.0, text=text, **more)


def test_equality_shows_the_first_difference() -> None:
    both = [
        (answer(4, "the cat sat on a mat"), answer(4, "the cat sat on a rug")),
        (answer(2, "one two"), answer(2, "one two three")),
        (answer(3, "same"), answer(3, "same")),
        (answer(5, ""), answer(5, "")),
    ]
    found = equality(both)
    assert found is not None
    assert (found.pairs, found.equal) == (3, 1)
    assert found.common == pytest.approx((17 / 20 + 7 / 13 + 1) / 3)
    assert found.first is not None
    assert (found.first.index, found.first.position, found.first.before) == (2, 7, "one two")
    assert (found.first.a, found.first.b) == ("", " three")
    assert equality(both[3:]) is None


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (ratio(1.25), "faster"), (ratio(0.9), "slower"), (ratio(1.01), "no difference"),
        (ratio(1.1, 0.1), "too few"), (ratio(1.5, None), "too few"), (None, "too few"),
    ],
)  # fmt: skip
def test_outcomes(one: Ratio | None, expected: str) -> None:
    assert outcome(one) == expected


def test_the_verdict_of_one_load(fake: Callable[..., Any]) -> None:
    (found,) = comparisons(fake().comparison(1))
    assert verdict(found).startswith("B is 1.2")
    assert "× as fast as A at concurrency 8 (95 %: 1." in verdict(found)
    slow = compare(fake(speedup=0.8).comparison(1), "A", "B")
    assert verdict(slow).startswith("B is slower than A: 0.")
    same = compare(fake(speedup=1.0).comparison(3), "A", "B")
    assert verdict(same).startswith("No difference found between A and B (95 %: 0.9")
    few = compare(fake(rounds=2, requests=3).comparison(1), "A", "B")
    assert verdict(few) == "Too few requests to say which of A and B is faster (6 pairs)."


def test_the_verdict_of_several_loads_says_where_b_stops_winning(fake: Callable[..., Any]) -> None:
    runs = [
        run
        for place, speedup in enumerate((1.6, 1.3, 1.0, 0.8))
        for run in fake(speedup=speedup, block=0.005, rounds=6).runs(place, {"concurrency": 4**place})
    ]
    found = compare(Comparison([VariantInfo("A", ""), VariantInfo("B", "")], runs), "A", "B")
    said = verdict(found)
    assert said.startswith("B is 1.6")
    for part in (
        " as fast as A at concurrency 1 (95 %: ", " at concurrency 4 (", "; B is slower than A: 0.",
        "× as fast at concurrency 64 (95 %: ", "; no difference found at concurrency 16 (95 %: ",
        "; it stops winning at about concurrency 1",
    ):  # fmt: skip
        assert part in said
    ((others, one),) = found.break_evens
    assert (others, one.kind, one.axis) == ({}, "at", "concurrency")
    assert cautions(found) == []


def test_nothing_to_compare(fake: Callable[..., Any]) -> None:
    whole = fake().comparison(1)
    alone = msgspec.structs.replace(whole, runs=[run for run in whole.runs if run.variant == "A"])
    for one in (alone, msgspec.structs.replace(whole, runs=[])):
        found = compare(one, "A", "B")
        assert found.loads == []
        assert verdict(found) == "Nothing to compare: no request was answered by both A and B."
        assert cautions(found) == []
        assert "×" not in text(found)


def test_a_terminal_shows_what_both_sides_have(fake: Callable[..., Any]) -> None:
    lines = text(compare(fake(speedup=1.25).comparison(1), "A", "B")).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("concurrency 8 (200 pairs in 5 rounds)"))
    names = [line.partition("  ")[0] for line in lines[head + 1 : lines.index("", head)]]
    assert names[-2:] == ["requests/s", "output tokens/s"]
    latencies = [f"{name} {kind}, ms" for name in ("TTFT", "TPOT", "ITL", "E2EL") for kind in ("p50", "p90", "p99")]
    assert [name for name in names if name in latencies] == latencies
    assert lines[lines.index("", head) + 1].endswith("without one: too few requests for it.")  # p99 of 200 requests
    assert all("×" in line for line in lines[head + 1 : head + 1 + len(names)])


def test_what_a_reader_must_know(fake: Callable[..., Any]) -> None:
    whole = fake(rounds=1).comparison(1)
    a, b = sorted(whole.runs, key=lambda run: run.variant)
    refused = answer(0, "", error="refused")
    longer = [msgspec.structs.replace(one, output_tokens=9) for one in b.requests[1:]]
    runs = [a, msgspec.structs.replace(b, complete=False, requests=[refused, *longer])]
    said = cautions(compare(msgspec.structs.replace(whole, runs=runs), "A", "B"))
    assert [line.partition(":")[0].partition(";")[0] for line in said] == [
        "1 of 40 requests to B failed", "The measurement was cut short",
        "One round tells nothing of drift", "Answers differ in length (6.0 tokens on average with A, 9.0 with B)",
    ]  # fmt: skip


def test_loads_come_by_size_and_are_named() -> None:
    loads: list[Load] = [{"rate": "inf"}, {"rate": 16.0}, {"rate": 2.5}]
    runs = [RunRecord("A", 0, load, 1.0, []) for load in loads]
    assert [load["rate"] for load, _ in by_load(runs)] == [2.5, 16.0, "inf"]
    assert load_name({"rate": 2.5, "adapters": 8}) == "2.5 requests/s, 8 adapters"
    assert load_names([{"concurrency": 1}]) == "concurrency 1"
    assert load_names([{"rate": 1}, {"rate": 2.5}, {"rate": 4}]) == "1, 2.5 and 4 requests/s"
    assert load_names([{"rate": 2.0**place} for place in range(7)]) == "1 to 64 requests/s"
    assert load_names([{"rate": 1}, {"rate": 1, "rank": 8}]) == "1 requests/s and 1 requests/s, rank 8"
    assert varied([{"rate": 1, "rank": 8}, {"rate": 2, "rank": 8}]) == ["rate"]


def test_a_missing_package_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"A report needs matplotlib.*pip install 'specserve\[bench\]'"):
        needed("matplotlib", "A report")
