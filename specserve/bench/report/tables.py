"""Tables of the HTML report: who wins where, at a glance; and every figure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log

from specserve.bench.compare import AtLoad, Compared, along
from specserve.bench.stats import Ratio
from specserve.bench.verdict import outcome
from specserve.bench.words import load_name, metric_name

CLASSES = {"faster": "faster", "slower": "slower", "no difference": "same", "too few": "few"}
TOLD = {
    "faster": "wins",
    "slower": "loses",
    "no difference": "no difference found",
    "too few": "too few requests to say",
}
SHOWN = (
    "mean_e2el_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms", "output_throughput",
    "request_goodput",
)  # fmt: skip
"""Metrics that a reader sees at first; all the rest stands further down."""
ROWS = 10  # of the first table
WIDTH, HEIGHT, PAD = 170, 26, 8  # of a strip, in pixels


def at_a_glance(compared: Compared) -> str:
    """The table of all loads and metrics; with many loads a smaller one comes first, of the headline alone."""
    if len(compared.loads) <= ROWS:
        return matrix(compared)
    axis = next((name for name in ("concurrency", "rate", *compared.varied) if name in compared.varied), "")
    small = grid(compared, axis)
    if not small:
        return matrix(compared)
    return f"{small}<details><summary>Every metric at every load</summary>{matrix(compared)}</details>"


def grid(compared: Compared, axis: str) -> str:
    """The headline's speedups: a row for each load on the axis, a column for each choice of what else was varied."""
    columns = along(compared.loads, axis)
    places = list(dict.fromkeys(at.load[axis] for _, group in columns for at in group))
    heads = "".join(f"<th>{escape(load_name(others) or 'speedup')}</th>" for others, _ in columns)
    body = ""
    for place in places:
        found = [next((at for at in group if at.load[axis] == place), None) for _, group in columns]
        cells = "".join(_cell(at.headline if at else None) for at in found)
        body += f"<tr><th>{escape(load_name({axis: place}))}</th>{cells}</tr>"
    head = f"<thead><tr><th>times as fast as {escape(compared.a.variant)} (mean E2EL)</th>{heads}</tr></thead>"
    return f'<div class="scroll"><table class="matrix">{head}<tbody>{body}</tbody></table></div>' if body else ""


def matrix(compared: Compared) -> str:
    """A row for each load: a strip with the headline's bounds, and the speedup in each metric."""
    metrics = shown(compared)
    if not metrics:
        return ""
    heads = "".join(f"<th>{escape(metric_name(metric))}</th>" for metric in metrics)
    reach = _reach(compared.loads)
    body = "".join(
        f"<tr><th>{escape(load_name(at.load) or 'all requests')}</th><td class='strip'>{strip(at.headline, reach)}</td>"
        f"{''.join(_cell(at.ratios.get(metric)) for metric in metrics)}</tr>"
        for at in compared.loads
    )
    a, b = escape(compared.a.variant), escape(compared.b.variant)
    sides = f"<th class='strip'>← {a} faster · {b} faster →</th>"
    head = f"<thead><tr><th>times as fast as {a}</th>{sides}{heads}</tr></thead>"
    return f'<div class="scroll"><table class="matrix">{head}<tbody>{body}</tbody></table></div>'


def strip(ratio: Ratio | None, reach: float) -> str:
    """An <svg>: the line at 1, the bounds and the estimate, logarithmic; `reach`: the largest log speedup shown."""
    if ratio is None:
        return ""

    def across(value: float) -> float:
        return WIDTH / 2 + max(-1.0, min(1.0, log(value) / reach)) * (WIDTH / 2 - PAD)

    kind = outcome(ratio)
    colour = {"faster": "var(--win)", "slower": "var(--lose)"}.get(kind, "var(--muted)")
    low, high = ratio.bounds or (ratio.speedup, ratio.speedup)
    middle, place = HEIGHT / 2, across(ratio.speedup)
    label = f"{ratio.speedup:.2f}×, {TOLD[kind]}"
    return (
        f'<svg class="forest" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<line x1="{PAD}" x2="{WIDTH - PAD}" y1="{middle}" y2="{middle}" stroke="var(--grid)"/>'
        f'<line x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="3" y2="{HEIGHT - 3}" stroke="var(--muted)"/>'
        f'<line x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{middle}" y2="{middle}" stroke="{colour}" '
        f'stroke-width="5" stroke-linecap="round" stroke-opacity="0.45"/>'
        f'<circle cx="{place:.1f}" cy="{middle}" r="5" fill="{colour}"/></svg>'
    )


def details(compared: Compared) -> str:
    """Every figure of every load, folded away."""
    a, b = compared.a.variant, compared.b.variant
    return "".join(
        f"<details><summary>{escape(f'{a} and {b}, {load_name(at.load)}' if at.load else f'{a} and {b}')}: "
        f"all figures</summary><p class='small'>{escape(_counts(compared, at))}</p>"
        f'<div class="scroll"><table>{_heads((a, b))}<tbody>{_rows(at)}</tbody></table></div></details>'
        for at in compared.loads
    )


def _counts(compared: Compared, at: AtLoad) -> str:
    def side(name: str, completed: int, failed: int) -> str:
        return f"{name}: {completed} requests" + (f", {failed} failed" if failed else "")

    sides = (
        side(compared.a.variant, at.a.completed, at.a.failed),
        side(compared.b.variant, at.b.completed, at.b.failed),
    )
    return f"{at.pairs} pairs in {at.rounds} rounds. {'; '.join(sides)}. Times are milliseconds."


def _heads(names: Sequence[str]) -> str:
    columns = ["", *names, f"{names[1]} / {names[0]}", "bounds", f"{names[1]}"]
    return "<thead><tr>" + "".join(f'<th class="right">{escape(column)}</th>' for column in columns) + "</tr></thead>"


def _rows(at: AtLoad) -> str:
    return "".join(
        f"<tr><th>{escape(metric_name(ratio.metric))}</th>"
        f'<td class="right">{_figure(ratio.a)}</td><td class="right">{_figure(ratio.b)}</td>'
        f'<td class="right">{ratio.ratio:.3f}</td><td class="right">{_bounds(ratio)}</td>'
        f'<td class="right {CLASSES[outcome(ratio)]}"><b>{TOLD[outcome(ratio)]}</b></td></tr>'
        for ratio in at.ratios.values()
    )


def _bounds(ratio: Ratio) -> str:
    return "–" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f}–{ratio.high:.3f}"


def _cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return "<td>–</td>"
    bounds = "too few" if ratio.bounds is None else "{:.2f}–{:.2f}".format(*ratio.bounds)
    kind = outcome(ratio)
    return f'<td class="{CLASSES[kind]}" title="{TOLD[kind]}"><b>{ratio.speedup:.2f}×</b><span>{bounds}</span></td>'


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def shown(compared: Compared) -> list[str]:
    """Of SHOWN, what at least one load has bounds for; if nothing has, what there is."""
    known = {metric: [at.ratios[metric] for at in compared.loads if metric in at.ratios] for metric in SHOWN}
    bounded = [metric for metric in SHOWN if any(ratio.bounds is not None for ratio in known[metric])]
    return bounded or [metric for metric in SHOWN if known[metric]]


def _reach(loads: Sequence[AtLoad]) -> float:
    """The farthest bound from 1, of logarithms; at least a tenth."""
    known = [value for at in loads if at.headline for value in (*(at.headline.bounds or ()), at.headline.speedup)]
    return max([0.1, *(abs(log(value)) for value in known)])
