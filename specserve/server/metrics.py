"""Prometheus metrics: vLLM's names, which dashboards rely on, and ours by adapter, with a bounded number of labels."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from specserve.core.messages import EngineStats
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.recorder import FinishedRequest
from specserve.server.adapter_metrics import MAX_ADAPTER_LABELS, adapter_metrics, tier_metrics
from specserve.server.histogram import StreamHistogram

# Seconds.
_LATENCY = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0)
_GAP = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Metrics:
    """One server's registry. As the client's Recorder it is told of requests; the rest is read at each scrape."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN)
        self._inter_token = StreamHistogram(
            "vllm:inter_token_latency_seconds", "Between steps with tokens.", {"model_name": model_name}, _GAP
        )
        self.registry.register(self._inter_token)
        self._total = self._histogram("e2e_request_latency_seconds", "Arrival to end.", _LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step.", _LATENCY)
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token.", _LATENCY)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last.", _LATENCY)
        self._inference = self._histogram("request_inference_time_seconds", "First step to last token.", _LATENCY)
        self._ended = Counter(
            "vllm:request_success", "Requests that ended.", ["model_name", "finished_reason"], registry=self.registry
        )

    def watch(self, engine: AsyncEngine, max_loras: int) -> None:
        """Read the engine's statistics at each scrape."""
        self.registry.register(EngineCollector(engine, self._model, max_loras))

    def render(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        self._inter_token.observe(seconds)

    def finished(self, request: FinishedRequest) -> None:
        self._ended.labels(self._model, request.finish_reason).inc()
        self._total.observe(request.total)
        if request.queue is not None:
            self._queue.observe(request.queue)
        if request.prefill is not None and request.decode is not None:
            self._prefill.observe(request.prefill)
            self._decode.observe(request.decode)
            self._inference.observe(request.prefill + request.decode)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", documentation, ["model_name"], registry=self.registry, buckets=buckets)
        return histogram.labels(self._model)


class EngineCollector:
    """The engine's own counters and gauges. A restarted engine counts from 0, as Prometheus expects of restarts."""

    def __init__(self, engine: AsyncEngine, model_name: str, max_loras: int) -> None:
        self._engine = engine
        self._model = model_name
        self._max_loras = max_loras

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield from _speculation(stats)
        yield self._lora_requests()
        yield from adapter_metrics(stats.adapters)
        yield from tier_metrics(stats.adapter_tiers)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        used = stats.num_blocks - stats.num_free_blocks
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.num_running),
            ("num_requests_waiting", "Requests that wait for it.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used / max(stats.num_blocks, 1)),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_hits),
            ("num_preemptions", "Requests preempted.", stats.preemptions),
            ("spec_decode_num_drafts", "Rounds of speculation.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens accepted.", stats.num_accepted_tokens),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Rounds whose draft at this position was accepted.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(stats.accepted_per_pos):
            accepted.add_metric([self._model, str(position)], count)
        yield accepted

    def _lora_requests(self) -> Metric:
        """vLLM's odd one: the names are the labels and the value is the time."""
        names: dict[bool, set[str]] = {True: set(), False: set()}
        for sequence in self._engine.live:
            names[sequence.times.first_token is not None].update(ref.name for ref in sequence.request.lora)
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and waiting requests.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        info.add_metric([str(self._max_loras), _list(names[True]), _list(names[False])], time.time())
        return info


def _speculation(stats: EngineStats) -> Iterator[Metric]:
    """How many tokens the engine chooses to draft, and how well it knows what that costs."""
    for name, text, value in (
        ("draft_length", "Drafts a row that the engine chose for its latest step, on average.", stats.draft_length),
        ("step_cost_ratio", "Time of steps over the time predicted for them.", stats.step_cost_ratio),
    ):
        yield GaugeMetricFamily(f"specserve:{name}", text, value=value)
    for name, text, count in (
        ("probed_rows", "Rows drafted for only to learn their acceptance.", stats.probed_rows),
        ("probe_seconds", "Time that such probes took.", stats.probe_seconds),
    ):
        yield CounterMetricFamily(f"specserve:{name}", text, value=count)
    # How many are drafted varies: acceptance at a position is vLLM's counter of the accepted ones over this one.
    drafted = CounterMetricFamily(
        "specserve:drafted_per_pos", "Rounds with a draft at this position.", labels=["position"]
    )
    for position, rounds in enumerate(stats.drafted_per_pos):
        drafted.add_metric([str(position)], rounds)
    yield drafted


def _list(names: set[str]) -> str:
    return ",".join(sorted(names)[:MAX_ADAPTER_LABELS])
