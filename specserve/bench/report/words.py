"""Names of metrics for a reader, and which of them are shown first."""

from __future__ import annotations

from specserve.bench.compare import AtLoad, Compared

SHOWN = (
    "mean_e2el_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "output_throughput",
    "request_goodput",
)  # fmt: skip
"""What a reader sees at first; all the rest stands further down."""
_KINDS = {"mean": "mean", "median": "p50", "p90": "p90", "p99": "p99", "std": "std"}
_WHOLE = {
    "request_throughput": "requests/s", "output_throughput": "output tokens/s",
    "total_token_throughput": "all tokens/s", "request_goodput": "goodput",
}  # fmt: skip


def metric_name(metric: str) -> str:
    """Of vLLM's name: "median_ttft_ms" → "TTFT p50"."""
    if metric in _WHOLE:
        return _WHOLE[metric]
    kind, latency, _ = metric.split("_")
    return f"{latency.upper()} {_KINDS[kind]}"


def shown(compared: Compared) -> list[str]:
    """Of SHOWN, what at least one load has bounds for; if nothing has, what there is."""
    known = [metric for metric in SHOWN if any(metric in at.ratios for at in compared.loads)]
    bounded = [metric for metric in known if any(_bounded(at, metric) for at in compared.loads)]
    return bounded or known


def _bounded(at: AtLoad, metric: str) -> bool:
    return metric in at.ratios and at.ratios[metric].bounds is not None
