"""A histogram that is cheap to add to: prometheus_client's takes locks for each value, this one stays on one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class StreamHistogram(Collector):
    """Counts of values up to each of `bounds`, and beyond. Use on one thread."""

    def __init__(self, name: str, documentation: str, labels: dict[str, str], bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's Histogram exposes it."""
        metric = HistogramMetricFamily(self._name, self._documentation, labels=list(self._labels))
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(map(float, self._counts)), strict=True))
        metric.add_metric(list(self._labels.values()), buckets=buckets, sum_value=self._sum)
        yield metric
