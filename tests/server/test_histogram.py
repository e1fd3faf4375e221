"""The cheap histogram says what prometheus_client's says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from specserve.server.histogram import StreamHistogram

BOUNDS = (0.002, 0.5, 1.0, 2.5)


@given(values=st.lists(st.sampled_from(BOUNDS) | st.floats(0.0, 4.0), max_size=20))
def test_exposition(values: list[float]) -> None:
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("vllm:gap_seconds", "Text.", ["model_name"], registry=theirs, buckets=BOUNDS)
    labelled = histogram.labels("m")
    quick = StreamHistogram("vllm:gap_seconds", "Text.", {"model_name": "m"}, BOUNDS)
    ours.register(quick)
    for value in values:
        labelled.observe(value)
        quick.observe(value)
    want = [line for line in generate_latest(theirs).splitlines() if b"_created" not in line]
    assert generate_latest(ours).splitlines() == want
