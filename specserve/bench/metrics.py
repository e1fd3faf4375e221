"""From the records of requests to what is told of them, by the names and with the meanings of `vllm bench serve`.

    TTFT   time to first token        first event with tokens − sent
    TPOT   time per output token      (last event with tokens − first) / (output tokens − 1); none of one token
    ITL    inter-token latency        each gap between two events with tokens, whatever number of tokens they bring
    E2EL   end-to-end latency         the stream's end − sent

A request that failed counts as failed and gives neither times nor tokens. Goodput counts the requests that kept every
service level objective (SLO), a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from specserve.bench.acceptance import Acceptance, acceptance
from specserve.bench.records import RequestRecord, RunRecord
from specserve.core.errors import InvalidRequestError

LATENCIES = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (90.0, 99.0)  # beside the median
Seconds = npt.NDArray[np.float64]


class Timing(msgspec.Struct, frozen=True):
    """One request's times, in seconds; None: it has none, or the server did not stream."""

    ttft: float | None
    tpot: float | None
    itl: list[float]
    e2el: float


class Slos(msgspec.Struct, frozen=True, omit_defaults=True):
    """Service level objectives, in milliseconds; None: any time will do."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Slos:
        """Of `--goodput ttft:500 tpot:50`; raises InvalidRequestError."""
        found: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition(":")
            if name not in cls.__struct_fields__ or not value.replace(".", "", 1).isdecimal():
                fields = ", ".join(cls.__struct_fields__)
                raise InvalidRequestError(f"{text!r} is not NAME:MILLISECONDS with NAME of {fields}.", param="goodput")
            found[name] = float(value)
        return cls(**found)

    def kept(self, timing: Timing) -> bool:
        """A request of one token has no TPOT, which any limit allows; one that was not streamed begins at its end."""
        ttft = timing.e2el if timing.ttft is None else timing.ttft
        times = ((self.ttft, ttft), (self.tpot, timing.tpot or 0.0), (self.e2el, timing.e2el))
        return all(limit is None or time * 1000 <= limit for limit, time in times)


class Distribution(msgspec.Struct, frozen=True):
    """Of times, in milliseconds."""

    count: int
    mean: float
    median: float
    std: float
    p90: float
    p99: float
    percentiles: dict[float, float] = {}  # those that were asked for, least first


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one variant did under one load. Throughputs are a second; a distribution without values is None."""

    completed: int
    failed: int
    duration: float  # s, of all runs together
    total_input_tokens: int
    total_output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    request_goodput: float | None  # None: no SLOs were set
    ttft: Distribution | None = None
    tpot: Distribution | None = None
    itl: Distribution | None = None
    e2el: Distribution | None = None
    acceptance: Acceptance | None = None  # None: nothing was drafted, or the server does not tell

    def flat(self) -> dict[str, float]:
        """By the names of the JSON that `vllm bench serve --save-result` writes, p50 being its median."""
        values = {
            "completed": self.completed, "failed": self.failed, "duration": self.duration,
            "total_input_tokens": self.total_input_tokens, "total_output_tokens": self.total_output_tokens,
            "request_throughput": self.request_throughput, "output_throughput": self.output_throughput,
            "total_token_throughput": self.total_token_throughput,
        }  # fmt: skip
        if self.request_goodput is not None:
            values["request_goodput"] = self.request_goodput
        for name in LATENCIES:
            distribution: Distribution | None = getattr(self, name)
            if distribution is not None:
                values |= {f"{kind}_{name}_ms": getattr(distribution, kind) for kind in ("mean", "median", "std")}
                values |= {f"p{at:g}_{name}_ms": value for at, value in distribution.percentiles.items()}
        return values | (self.acceptance.flat() if self.acceptance else {})


def succeeded(record: RequestRecord) -> bool:
    return record.error is None


def output_tokens(record: RequestRecord) -> int:
    """As the server told, else as its events brought."""
    return record.output_tokens or sum(event.tokens for event in record.events)


def timing(record: RequestRecord) -> Timing:
    """Of a request that succeeded."""
    times = [event.time for event in record.events if event.tokens]
    tokens, e2el = output_tokens(record), record.end - record.sent
    if not times:
        return Timing(None, None, [], e2el)
    tpot = (times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Timing(times[0] - record.sent, tpot, gaps, e2el)


def summarise(
    runs: Sequence[RunRecord], slos: Slos | None = None, percentiles: Sequence[float] = PERCENTILES
) -> Summary:
    """Of one variant's runs under one load: times of all their requests together, throughputs over their whole time."""

    def told(seconds: Sequence[float]) -> Distribution | None:
        return distribution(seconds, percentiles)

    records = [record for run in runs for record in run.requests]
    good = [record for record in records if succeeded(record)]
    timings, duration = [timing(record) for record in good], sum(run.duration for run in runs)
    inputs, outputs = sum(record.prompt_tokens for record in good), sum(map(output_tokens, good))
    kept = None if slos is None else sum(map(slos.kept, timings))
    return Summary(
        completed=len(good),
        failed=len(records) - len(good),
        duration=duration,
        total_input_tokens=inputs,
        total_output_tokens=outputs,
        request_throughput=_rate(len(good), duration),
        output_throughput=_rate(outputs, duration),
        total_token_throughput=_rate(inputs + outputs, duration),
        request_goodput=None if kept is None else _rate(kept, duration),
        ttft=told([one.ttft for one in timings if one.ttft is not None]),
        tpot=told([one.tpot for one in timings if one.tpot is not None]),
        itl=told([gap for one in timings for gap in one.itl]),
        e2el=told([one.e2el for one in timings]),
        acceptance=acceptance(good),
    )


def distribution(seconds: Sequence[float], percentiles: Sequence[float] = PERCENTILES) -> Distribution | None:
    """Percentiles are interpolated linearly, as numpy does by itself."""
    if not seconds:
        return None
    ms: Seconds = np.asarray(seconds, dtype=np.float64) * 1000
    p50, p90, p99 = (float(value) for value in np.percentile(ms, (50, 90, 99)))
    asked = {at: float(np.percentile(ms, at)) for at in sorted(set(percentiles))}
    return Distribution(len(ms), float(ms.mean()), p50, float(ms.std()), p90, p99, asked)


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0
