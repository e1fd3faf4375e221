"""Names of metrics for a reader, and a comparison as a table for the terminal."""

from __future__ import annotations

from specserve.bench.compare import AtLoad, Compared
from specserve.bench.stats import Ratio
from specserve.bench.verdict import load_name, outcome, stated

SHOWN = (
    "mean_e2el_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "output_throughput",
    "request_goodput",
)  # fmt: skip
"""What a reader sees at first; all the rest stands further down."""
MARKS = {"faster": "+", "slower": "-", "no difference": "=", "too few": "?"}
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


def table(compared: Compared) -> str:
    """Speedups with bounds: a row for each load, aligned; empty without loads."""
    metrics = shown(compared)
    if not metrics:
        return ""
    head = ["", *(metric_name(metric) for metric in metrics)]
    rows = [head, *([load_name(at.load) or "all", *(_cell(at, metric) for metric in metrics)] for at in compared.loads)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    a, b = compared.a.variant, compared.b.variant
    legend = (
        f"times as fast (or as much) as {a}; + {b} wins, - {a} wins, = no difference found, ? too few requests to say"
    )
    return "\n".join([*lines, legend])


def _bounded(at: AtLoad, metric: str) -> bool:
    return metric in at.ratios and at.ratios[metric].bounds is not None


def _cell(at: AtLoad, metric: str) -> str:
    ratio: Ratio | None = at.ratios.get(metric)
    return f"{MARKS[outcome(ratio)]} {stated(ratio)}" if ratio else "-"
