"""What loads and metrics are called for a reader."""

from __future__ import annotations

from collections.abc import Sequence

from specserve.bench.records import Load

UNITS = {
    "concurrency": "concurrency {}", "rate": "{} requests/s", "adapters": "{} adapters", "rank": "rank {}",
}  # fmt: skip
LISTED = 3  # loads that are named one by one; of more, the first and the last
_KINDS = {"mean": "mean", "median": "p50", "p90": "p90", "p99": "p99"}
_THROUGHPUTS = {
    "request_throughput": "requests/s", "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s", "request_goodput": "goodput, requests/s",
}  # fmt: skip


def load_name(load: Load) -> str:
    """Of one: "concurrency 8", "2.5 requests/s, 8 adapters". Loads that differ have different names."""
    names = (UNITS.get(name, name + " {}").format(number(value)) for name, value in load.items())
    return ", ".join("1 adapter" if name == "1 adapters" else name for name in names)


def load_names(loads: Sequence[Load]) -> str:
    """Of several: "concurrency 1, 4 and 16"; of many the first and the last, "2 to 64 requests/s"."""
    if len(loads) > 1 and all(load.keys() == loads[0].keys() and len(load) == 1 for load in loads):
        (name,) = loads[0]
        return UNITS.get(name, name + " {}").format(_listed([number(load[name]) for load in loads]))
    return _listed([load_name(load) for load in loads])


def number(value: float | int | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def metric_name(metric: str) -> str:
    """Of vLLM's name: "median_ttft_ms" → "TTFT p50"."""
    if metric in _THROUGHPUTS:
        return _THROUGHPUTS[metric]
    kind, latency, _ = metric.split("_")
    return f"{latency.upper()} {_KINDS[kind]}"


def _listed(names: Sequence[str]) -> str:
    if len(names) > LISTED:
        return f"{names[0]} to {names[-1]}"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
