"""Metrics of requests: vLLM's meanings, worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from specserve.bench.acceptance import Acceptance, acceptance, by_adapter
from specserve.bench.metrics import Slos, summarise, timing
from specserve.bench.metrics_text import text
from specserve.bench.records import Event, RequestRecord, RunRecord
from specserve.core.errors import InvalidRequestError


def request(index: int, *times: float, tokens: int = 1, end: float = 3.0, **more: object) -> RequestRecord:
    """Sent at 1 s; each event brings `tokens`."""
    events = [Event(time, tokens) for time in times]
    values = {"prompt_tokens": 10, "output_tokens": tokens * len(times)} | more
    return RequestRecord(index, 1.0, events, end, **values)  # type: ignore[arg-type]


def run(*requests: RequestRecord, duration: float = 4.0, **more: object) -> RunRecord:
    return RunRecord("A", 0, {}, duration, list(requests), **more)  # type: ignore[arg-type]


def test_the_times_of_one_request() -> None:
    one = timing(request(0, 1.5, 2.0, 2.75, tokens=2))
    assert (one.ttft, one.tpot, one.itl, one.e2el) == (0.5, 1.25 / 5, [0.5, 0.75], 2.0)


def test_an_event_without_tokens_is_no_first_token() -> None:
    record = RequestRecord(0, 1.0, [Event(1.1, 0), Event(1.5, 1), Event(2.0, 1), Event(2.9, 0)], 3.0)
    one = timing(record)
    assert (one.ttft, one.tpot, one.itl) == (0.5, 0.5, [0.5])


def test_one_token_has_no_time_per_token_and_none_no_first() -> None:
    assert timing(request(0, 1.5)).tpot is None
    nothing = timing(request(0))
    assert (nothing.ttft, nothing.tpot, nothing.itl, nothing.e2el) == (None, None, [], 2.0)


def test_rates_and_percentiles_of_several_runs() -> None:
    ends = np.linspace(2.0, 12.0, 101)
    records = [request(index, 1.5, 2.0, end=end) for index, end in enumerate(ends)]
    summary = summarise([run(*records[:50], duration=4.0), run(*records[50:], duration=6.0)])
    assert (summary.completed, summary.failed, summary.duration) == (101, 0, 10.0)
    assert (summary.total_input_tokens, summary.total_output_tokens) == (1010, 202)
    assert summary.request_throughput == pytest.approx(10.1)
    assert summary.output_throughput == pytest.approx(20.2)
    assert summary.total_token_throughput == pytest.approx(121.2)
    assert summary.e2el is not None
    e2el = summary.e2el
    assert (e2el.mean, e2el.median, e2el.p90, e2el.p99) == pytest.approx((6000, 6000, 10000, 10900))
    assert e2el.std == pytest.approx(1000 * np.std(ends))
    assert summary.flat()["median_ttft_ms"] == pytest.approx(500)


def test_a_failed_request_gives_neither_times_nor_tokens() -> None:
    summary = summarise([run(request(0, 1.5, 2.0), request(1, 1.1, error="the connection broke"))])
    assert (summary.completed, summary.failed, summary.total_output_tokens) == (1, 1, 2)
    assert summary.ttft is not None
    assert summary.ttft.mean == pytest.approx(500)


@pytest.mark.parametrize("runs", [[], [run()], [run(request(0, error="refused"), duration=0.0)]])
def test_without_one_good_request_there_is_nothing_but_zeros(runs: list[RunRecord]) -> None:
    summary = summarise(runs, Slos(ttft=100))
    assert (summary.completed, summary.request_throughput, summary.request_goodput) == (0, 0.0, 0.0)
    assert summary.ttft is summary.tpot is summary.itl is summary.e2el is summary.acceptance is None
    assert "Mean TTFT" not in text(summary)


def test_goodput_counts_who_kept_every_objective() -> None:
    fast, slow_start = request(0, 1.1, 1.2, 1.3, end=1.3), request(1, 2.0, 2.1, end=2.1)
    slow_token, single = request(2, 1.1, 2.1, end=2.1), request(3, 1.1, end=1.1)
    runs = [run(fast, slow_start, slow_token, single)]
    assert summarise(runs).request_goodput is None
    assert summarise(runs, Slos(ttft=500, tpot=200)).request_goodput == pytest.approx(2 / 4.0)
    assert summarise(runs, Slos(tpot=200)).request_goodput == pytest.approx(3 / 4.0)
    assert summarise(runs, Slos(e2el=301)).request_goodput == pytest.approx(2 / 4.0)


def test_objectives_are_read_from_flags() -> None:
    assert Slos.parse(["ttft:500", "tpot:12.5"]) == Slos(ttft=500.0, tpot=12.5)
    for wrong in ("itl:5", "ttft", "ttft:", "ttft:soon", "ttft:-1"):
        with pytest.raises(InvalidRequestError, match="ttft, tpot, e2el"):
            Slos.parse([wrong])


def test_acceptance_adds_positions_of_different_lengths() -> None:
    records = [
        request(0, 1.5, adapter="sql", drafted_per_position=[4, 4, 2], accepted_per_position=[3, 1, 1]),
        request(1, 1.5, drafted_per_position=[6], accepted_per_position=[3]),
        request(2, 1.5, drafted_per_position=[0, 0], accepted_per_position=[0, 0], adapter="idle"),
        request(3, 1.5),
    ]
    found = acceptance(records)
    assert found == Acceptance([10, 4, 2], [6, 1, 1])
    assert (found.rate, found.length) == (0.5, 1.8)
    assert found.per_position == [0.6, 0.25, 0.5]
    assert by_adapter(records) == {None: Acceptance([6], [3]), "sql": Acceptance([4, 4, 2], [3, 1, 1])}
    assert acceptance(records[2:]) is None


def test_the_text_names_what_vllm_names() -> None:
    record = request(0, 1.5, 2.0, drafted_per_position=[4], accepted_per_position=[3])
    lines = text(summarise([run(record)], Slos(ttft=600))).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    for line in (
        "Successful requests:                     1",
        "Request goodput (req/s):                 0.25",
        "---------------Time to First Token----------------",
        "Median TTFT (ms):                        500.00",
        "P99 E2EL (ms):                           2000.00",
        "Acceptance rate (%):                     75.00",
    ):
        assert line in lines
