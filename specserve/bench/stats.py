"""How many times of A's B's figures are, and between what bounds: paired bootstrap intervals that hold under drift.

What varies twice is resampled on its own. Rounds, because a machine drifts and the requests of one run share its queue;
requests of the trace, the same ones in every round and for both variants, because other requests would have come out
otherwise. With the variance of log(B/A) over resampled rounds, requests, and single pairs,

    V = max(V_rounds + V_requests − V_pairs, V_rounds, V_requests)       each times n / (n − 1), n groups being few

which counts once what both of the first two count (Cameron, Gelbach, Miller 2011; for bootstraps Owen 2007). Bounds are
Student's, B/A · exp(± t √V), with Welch's and Satterthwaite's degrees of freedom V² / Σ Vᵢ²/(nᵢ − 1): five rounds know
little of their own spread, and percentiles of resamples of five would pretend to more. Throughputs belong to whole
runs: they vary over rounds alone. Of one round nobody knows what a second would say: `one_round` tells, and throughputs
have no bounds. Means are held to their 95 % in tests; bounds of quantiles are rather wider than needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from specserve.bench.extra import needed
from specserve.bench.metrics import LATENCIES, Slos, Timing, output_tokens, succeeded, timing
from specserve.bench.pairs import Pairs
from specserve.bench.records import RunRecord
from specserve.bench.resampling import Floats, Groups, Sample, draw

RESAMPLES = 400  # a standard error is then known to 3.5 %
MIN_PAIRS = 10
MIN_TAIL = 5  # requests beyond a quantile, below which its bounds are guesses: 500 requests for the p99 of TTFT
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


class Ratio(msgspec.Struct, frozen=True, omit_defaults=True):
    """B's figure over A's. `low` and `high` bound it; None: there is too little to say."""

    metric: str  # by vLLM's name, say median_ttft_ms
    a: float  # of the pairs; milliseconds, or a second
    b: float
    low: float | None = None
    high: float | None = None
    error: float | None = None  # standard error of log(b / a)
    freedom: float | None = None  # degrees of freedom of `error`
    one_round: bool = False  # the bounds know nothing of the spread between rounds

    @property
    def ratio(self) -> float:
        return self.b / self.a

    @property
    def lower_is_better(self) -> bool:
        return self.metric.endswith("_ms")

    @property
    def speedup(self) -> float:
        """How many times as fast B is, or as much it serves: above 1 it wins."""
        return self.a / self.b if self.lower_is_better else self.ratio

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of `speedup`."""
        if self.low is None or self.high is None:
            return None
        return (1 / self.high, 1 / self.low) if self.lower_is_better else (self.low, self.high)


def ratios(pairs: Pairs, slos: Slos | None = None, confidence: float = 0.95, seed: int = 0) -> list[Ratio]:
    """Of every metric that both variants have a figure other than 0 for. The same pairs and seed: the same bounds."""
    random = np.random.default_rng(seed)
    return [*_latencies(pairs, confidence, random), *_throughputs(pairs, slos, confidence, random)]


def _latencies(pairs: Pairs, confidence: float, random: np.random.Generator) -> list[Ratio]:
    if not pairs.both:
        return []
    timings = [(timing(one), timing(other)) for one, other in pairs.both]
    groups = [pairs.requests] if pairs.num_rounds == 1 else [pairs.rounds, pairs.requests, np.arange(len(timings))]
    schemes = [draw(group, RESAMPLES, random) for group in groups]
    found = []
    for name in LATENCIES:
        values = [[_values(one, name) for one in side] for side in zip(*timings, strict=True)]
        if not all(any(rows) for rows in values):
            continue
        a, b = (Sample.of(rows, [*QUANTILES.values()]) for rows in values)
        with np.errstate(invalid="ignore"):  # of times of 0, which have no logarithm and get no bounds
            logs = [b.logs(weights) - a.logs(weights) for weights in schemes]  # each [resamples, 1 + quantiles]
        tails = [MIN_TAIL, *np.minimum(a.tails, b.tails)]
        for column, kind in enumerate(("mean", *QUANTILES)):
            enough = len(timings) >= MIN_PAIRS and tails[column] >= MIN_TAIL
            ours, theirs = (1000 * float(side.figures[column]) for side in (a, b))
            if ours > 0 and theirs > 0:
                parts = [(log[:, column], _number(group)) for log, group in zip(logs, groups, strict=True)]
                metric = f"{kind}_{name}_ms"
                found.append(_ratio(metric, ours, theirs, parts if enough else [], confidence, pairs.num_rounds == 1))
    return found


def _throughputs(pairs: Pairs, slos: Slos | None, confidence: float, random: np.random.Generator) -> list[Ratio]:
    if not pairs.blocks:
        return []
    rounds = len(pairs.blocks)
    weights = draw(np.arange(rounds), RESAMPLES, random)
    seconds = np.array([[sum(run.duration for run in side) for side in block] for block in pairs.blocks])
    found = []
    for metric, count in _counted(slos).items():
        amounts = np.array([[sum(map(count, side)) for side in block] for block in pairs.blocks])  # [rounds, 2]
        ours, theirs = amounts.sum(axis=0) / seconds.sum(axis=0)
        if ours > 0 and theirs > 0:
            with np.errstate(divide="ignore", invalid="ignore"):
                rates = np.log((weights @ amounts) / (weights @ seconds))  # [resamples, 2]
                parts = [(rates[:, 1] - rates[:, 0], rounds)] if rounds > 1 else []
            found.append(_ratio(metric, float(ours), float(theirs), parts, confidence))
    return found


def _counted(slos: Slos | None) -> dict[str, Callable[[RunRecord], int]]:
    """What a run has of each throughput's numerator."""

    def good(run: RunRecord) -> list[Timing]:
        return [timing(one) for one in run.requests if succeeded(one)]

    def outputs(run: RunRecord) -> int:
        return sum(output_tokens(one) for one in run.requests if succeeded(one))

    def inputs(run: RunRecord) -> int:
        return sum(one.prompt_tokens for one in run.requests if succeeded(one))

    counted: dict[str, Callable[[RunRecord], int]] = {
        "request_throughput": lambda run: len(good(run)),
        "output_throughput": outputs,
        "total_token_throughput": lambda run: inputs(run) + outputs(run),
    }
    if slos is not None:
        counted["request_goodput"] = lambda run: sum(map(slos.kept, good(run)))
    return counted


def _ratio(
    metric: str, a: float, b: float, parts: Sequence[tuple[Floats, int]], confidence: float, one_round: bool = False
) -> Ratio:
    """`parts`: log ratios of resamples, and how many groups were drawn from; of rounds, requests and pairs, or one."""
    if not parts or not all(np.isfinite(logs).all() and number > 1 for logs, number in parts):
        return Ratio(metric, a, b)
    variances = [float(logs.var(ddof=1)) * number / (number - 1) for logs, number in parts]
    variance = variances[0]
    if len(variances) == 3:
        variance = max(variances[0] + variances[1] - variances[2], *variances[:2])
    spread = sum(one**2 / (number - 1) for one, (_, number) in zip(variances, parts, strict=True))
    if not spread:
        return Ratio(metric, a, b, b / a, b / a, 0.0, None, one_round)  # nothing varied
    freedom, error = variance**2 / spread, variance**0.5
    reach = float(needed("scipy.special", "A confidence interval").stdtrit(freedom, (1 + confidence) / 2)) * error
    low, high = (float(b / a * np.exp(sign * reach)) for sign in (-1, 1))
    return Ratio(metric, a, b, low, high, error, freedom, one_round)


def _values(one: Timing, name: str) -> list[float]:
    value = getattr(one, name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _number(groups: Groups) -> int:
    return int(groups.max()) + 1
