"""A summary as `vllm bench serve` prints it."""

from __future__ import annotations

from specserve.bench.metrics import Distribution, Summary

WIDTH = 50
TITLES = {
    "ttft": "Time to First Token", "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency", "e2el": "End-to-end Latency",
}  # fmt: skip


def text(summary: Summary, title: str = "Serving Benchmark Result") -> str:
    """Lines of 50 columns; what the summary lacks is left out."""
    counts = [
        _line("Successful requests:", summary.completed), _line("Failed requests:", summary.failed),
        _line("Benchmark duration (s):", summary.duration),
        _line("Total input tokens:", summary.total_input_tokens),
        _line("Total generated tokens:", summary.total_output_tokens),
        _line("Request throughput (req/s):", summary.request_throughput),
        *([] if summary.request_goodput is None else [_line("Request goodput (req/s):", summary.request_goodput)]),
        _line("Output token throughput (tok/s):", summary.output_throughput),
        _line("Total token throughput (tok/s):", summary.total_token_throughput),
    ]  # fmt: skip
    times = [line for name in TITLES for line in _times(name, getattr(summary, name))]
    lines = [f"{f' {title} ':=^{WIDTH}}", *counts, *times, *_acceptance(summary), "=" * WIDTH]
    return "\n".join(lines)


def _times(name: str, distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return []
    figures = {"Mean": distribution.mean, "Median": distribution.median}
    figures |= {f"P{at:g}": value for at, value in distribution.percentiles.items()}
    lines = [_line(f"{kind} {name.upper()} (ms):", value) for kind, value in figures.items()]
    return [f"{TITLES[name]:-^{WIDTH}}", *lines]


def _acceptance(summary: Summary) -> list[str]:
    found = summary.acceptance
    if found is None:
        return []
    return [
        f"{'Speculative Decoding':-^{WIDTH}}",
        _line("Acceptance rate (%):", 100 * found.rate),
        _line("Acceptance length:", found.length),
        _line("Drafts:", found.drafted[0]),
        _line("Draft tokens:", sum(found.drafted)),
        _line("Accepted tokens:", sum(found.accepted)),
        "Per-position acceptance (%):",
        *(_line(f"  Position {position}:", 100 * rate) for position, rate in enumerate(found.per_position)),
    ]


def _line(label: str, value: float) -> str:
    shown = str(value) if isinstance(value, int) else f"{value:.2f}"
    return f"{label:<40} {shown:<10}".rstrip()
