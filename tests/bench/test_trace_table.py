"""The arithmetic of a step's profile, on a made-up trace."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.trace_table import by_name, device_events, replays, table, timeline


def event(name: str, start: float, duration: float, launch: int, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": {"correlation": launch}}


# Two steps: a replay of two kernels 2 µs apart, then a copy on its own; 5 µs of nothing before the next replay.
TRACE = {
    "traceEvents": [
        event("gemm", 100.0, 10.0, 1), event("norm", 112.0, 4.0, 1), event("Memcpy DtoH", 118.0, 2.0, 2, "gpu_memcpy"),
        event("gemm", 125.0, 10.0, 3), event("norm", 137.0, 4.0, 3), event("Memcpy DtoH", 143.0, 2.0, 4, "gpu_memcpy"),
        event("aten::mm", 90.0, 60.0, 0, "cpu_op"), {"ph": "M", "name": "process_name"},
    ]
}  # fmt: skip


def test_idle_is_told_apart() -> None:
    line = timeline(device_events(TRACE), steps=2)
    assert line.step == pytest.approx(45 / 2)
    assert line.busy == pytest.approx(32 / 2)
    assert line.idle_inside == pytest.approx(4 / 2)
    assert line.idle_outside == pytest.approx((2 + 5 + 2) / 2)
    assert line.between == pytest.approx(9 / 2)
    assert line.replays == 1


def test_streams_that_overlap_are_counted_once() -> None:
    events = device_events({"traceEvents": [event("a", 0, 10, 1), event("b", 2, 3, 2), event("c", 12, 1, 3)]})
    line = timeline(events, steps=1)
    assert (line.busy, line.idle_outside, line.between) == (11, 2, None)
    assert replays(events) == []


def test_kernels_are_ranked_by_their_time() -> None:
    rows = by_name(device_events(TRACE), steps=2)
    assert rows[0] == ("gemm", "kernel", 10.0, 1.0)
    assert rows[-1] == ("Memcpy DtoH", "copy", 2.0, 1.0)
    text = table(device_events(TRACE), steps=2)
    assert "[copy] Memcpy DtoH" in text
    assert "idle inside graph replays (1.0 a step)" in text
