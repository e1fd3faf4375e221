"""Prometheus metrics of adapters: each of the most used ones, and the tiers as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from specserve.core.messages import AdapterInfo, AdapterTierStats

MAX_ADAPTER_LABELS = 100  # the most used ones; the rest add up under "other"
TIERS = {"disk": 0, "host": 1, "device": 2}


def adapter_metrics(adapters: Iterable[AdapterInfo]) -> Iterator[Metric]:
    """`specserve:adapter_*{adapter}`: counters of the MAX_ADAPTER_LABELS most used, the sum of the rest as "other".

    An adapter that is unloaded has no series any more.
    """
    ranked = sorted(adapters, key=lambda info: (-info.requests, info.name))
    named, rest = ranked[:MAX_ADAPTER_LABELS], ranked[MAX_ADAPTER_LABELS:]
    for field, text in (
        ("requests", "Requests that named the adapter."),
        ("tokens", "Tokens generated with it."),
        ("drafted", "Tokens drafted for its requests."),
        ("accepted", "Of these, tokens accepted."),
    ):
        counter = CounterMetricFamily(f"specserve:adapter_{field}", text, labels=["adapter"])
        for info in named:
            counter.add_metric([info.name], getattr(info, field))
        if rest:
            counter.add_metric(["other"], sum(getattr(info, field) for info in rest))
        yield counter
    tier = GaugeMetricFamily("specserve:adapter_tier", "Where it is: 0 disk, 1 host, 2 device.", labels=["adapter"])
    for info in named:
        tier.add_metric([info.name], TIERS[info.tier])
    yield tier


def tier_metrics(stats: AdapterTierStats) -> Iterator[Metric]:
    """`specserve:lora_*`: how full host memory and slots are, and what went through them."""
    for name, text, value in (
        ("host_bytes", "Host memory that adapters take.", stats.host_bytes),
        ("host_bytes_max", "Host memory that they may take.", stats.max_host_bytes),
        ("slots", "Slots on the device.", stats.slots),
        ("slots_used", "Slots that hold an adapter, in use or warm.", stats.slots_used),
    ):
        yield GaugeMetricFamily(f"specserve:lora_{name}", text, value=value)
    for name, text, count in (
        ("reads", "Adapters read from disk.", stats.reads),
        ("read_seconds", "Time that these reads took.", stats.read_seconds),
        ("loads", "Adapters copied to the device.", stats.loads),
        ("load_seconds", "Time that these copies took.", stats.load_seconds),
    ):
        yield CounterMetricFamily(f"specserve:lora_{name}", text, value=count)
    evictions = CounterMetricFamily("specserve:lora_evictions", "Adapters that made room for others.", labels=["tier"])
    evictions.add_metric(["host"], stats.evictions_host)
    evictions.add_metric(["device"], stats.evictions_device)
    yield evictions
