"""A comparison as a terminal shows it: the verdict, a table a load, and what else there is to know."""

from __future__ import annotations

from specserve.bench.compare import AtLoad, Compared
from specserve.bench.metrics import Summary
from specserve.bench.verdict import break_even_lines, cautions, notes, stated, verdict
from specserve.bench.words import load_name, metric_name

ROWS = (
    "median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p90_tpot_ms", "p99_tpot_ms", "median_itl_ms",
    "p90_itl_ms", "p99_itl_ms", "mean_e2el_ms", "median_e2el_ms", "p90_e2el_ms", "p99_e2el_ms", "request_throughput",
    "output_throughput", "request_goodput",
)  # fmt: skip
GOODPUT = "request_goodput"
MAX_SHOWN = 60  # characters of a difference


def text(compared: Compared) -> str:
    """Several lines: the figures that both sides have, with the interval of each speedup where it can be told."""
    a, b = compared.a, compared.b
    parts = [
        verdict(compared),
        *cautions(compared),
        "",
        f"{a.variant}: {a.title}",
        f"{b.variant}: {b.title}",
        *(line for at in compared.loads for line in ("", *_table(at, compared))),
        *_footnotes(compared),
        *break_even_lines(compared),
        *_equality(compared),
    ]
    return "\n".join(parts)


def _footnotes(compared: Compared) -> list[str]:
    if not compared.loads:
        return []
    a, b, share = compared.a.variant, compared.b.variant, f"{100 * compared.confidence:g} %"
    times = f"×: how many times as good {b} is as {a}, with the interval that holds it at {share}"
    found = [at.ratios[name] for at in compared.loads for name in ROWS if name in at.ratios]
    lacking = any(ratio.bounds is None for ratio in found)
    return ["", times + ("; without one: too few requests for it." if lacking else "."), *notes(compared)]


def _table(at: AtLoad, compared: Compared) -> list[str]:
    found = {name: at.ratios[name] for name in ROWS if name in at.ratios}
    head = (
        f"{load_name(at.load)} ({at.pairs} pairs in {at.rounds} round{'s' if at.rounds != 1 else ''})",
        compared.a.variant,
        compared.b.variant,
        "",
    )
    rows = [head, *(_row(name, ratio.a, ratio.b, stated(ratio)) for name, ratio in found.items())]
    if GOODPUT not in found and at.a.request_goodput is not None and at.b.request_goodput is not None:
        rows.append(_row(GOODPUT, at.a.request_goodput, at.b.request_goodput, ""))  # one of them has none
    accepted = _accepted(at.a), _accepted(at.b)
    if any(accepted):
        rows.append(("Drafts accepted", *accepted, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {ours:>{widths[1]}}  {theirs:>{widths[2]}}  {told}".rstrip()
        for name, ours, theirs, told in rows
    ]


def _row(metric: str, a: float, b: float, told: str) -> tuple[str, str, str, str]:
    return metric_name(metric) + (", ms" if metric.endswith("_ms") else ""), _figure(a), _figure(b), told


def _accepted(side: Summary) -> str:
    return f"{side.acceptance.rate:.0%}" if side.acceptance else ""


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _equality(compared: Compared) -> list[str]:
    found = compared.equality
    if found is None:
        return []
    told = f"{found.equal} of {found.pairs} answers have the same text on both sides ({found.share:.0%})"
    if found.first is None:
        return [f"{told}."]
    first = found.first
    ends = [
        f"  {name} goes on with {_shown(end)}"
        for name, end in ((compared.a.variant, first.a), (compared.b.variant, first.b))
    ]
    return [f"{told}; the first difference is in request {first.index}, after {_shown(first.before)}:", *ends]


def _shown(end: str) -> str:
    return repr(end[:MAX_SHOWN]) if end else "nothing more"
