"""When requests come: seconds after the start, never falling."""

from __future__ import annotations

import itertools
import math
import random

from specserve.bench.options import TraceOptions

DIGITS = 6  # µs: the last bits of a logarithm differ between machines, and the trace must not


def arrival_times(count: int, options: TraceOptions, rng: random.Random) -> list[float]:
    """Times of `count` requests: all 0 at an infinite rate; else sums of gamma-distributed gaps of mean 1/rate and
    shape `burstiness` (their standard deviation is mean / √burstiness), 1 being a Poisson process.

    Without a ramp they are stretched so that the last comes at count / rate, as `vllm bench serve` does: a seed's luck
    must not change the load.
    """
    rates = [_rate(options, index, count) for index in range(count)]
    if math.inf in rates:
        return [0.0] * count
    times = list(itertools.accumulate(_gap(rate, options.burstiness, rng) for rate in rates))
    stretch = count / options.request_rate / times[-1] if times and options.ramp_up_strategy is None else 1.0
    return [round(time * stretch, DIGITS) for time in times]


def _rate(options: TraceOptions, index: int, count: int) -> float:
    """Requests/s when request `index` is due; a ramp goes by the share of requests sent."""
    start, end = options.ramp_up_start_rps, options.ramp_up_end_rps
    if options.ramp_up_strategy is None or start is None or end is None:
        return options.request_rate
    progress = index / max(count - 1, 1)
    if options.ramp_up_strategy == "linear":
        return start + (end - start) * progress
    return float(start * (end / start) ** progress)


def _gap(rate: float, burstiness: float, rng: random.Random) -> float:
    if burstiness == math.inf:
        return 1.0 / rate
    return rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
