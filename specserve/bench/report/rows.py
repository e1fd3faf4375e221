"""What was found out, as rows of JSON Lines: each names its `kind`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from specserve.bench.acceptance import by_adapter
from specserve.bench.compare import Compared
from specserve.bench.gains import gains
from specserve.bench.metrics import Slos, summarise
from specserve.bench.pairs import by_load
from specserve.bench.records import Comparison
from specserve.bench.verdict import cautions, outcome, verdict

Row = dict[str, Any]


def rows(comparison: Comparison, found: Sequence[Compared], slos: Slos | None = None) -> Iterator[Row]:
    """Of every variant, then of every comparison."""
    yield {"kind": "facts", "facts": comparison.facts, "variants": msgspec.to_builtins(comparison.variants)}
    for info in comparison.variants:
        own = [run for run in comparison.runs if run.variant == info.variant]
        for load, runs in by_load(own):
            summary = summarise(runs, slos)
            yield {"kind": "summary", "variant": info.variant, "load": load, **summary.flat()}
        records = [record for run in own for record in run.requests if record.error is None]
        for adapter, one in by_adapter(records).items():
            counts = {"drafted": one.drafted, "accepted": one.accepted}
            yield {"kind": "acceptance", "variant": info.variant, "adapter": adapter, **counts}
    for compared in found:
        yield from _gains(comparison, compared)
        yield from _compared(compared)


def _gains(comparison: Comparison, compared: Compared) -> Iterator[Row]:
    a, b = compared.a.variant, compared.b.variant
    drafter, lines = gains(comparison.runs, a, b, compared.confidence)
    for load, points in lines:
        for alpha, ratio in points:
            low, high = ratio.bounds or (None, None)
            about = {"a": a, "b": b, "load": load, "drafter": drafter, "alpha": alpha, "metric": ratio.metric}
            yield {"kind": "by_acceptance", **about, "speedup": ratio.speedup, "low": low, "high": high}


def _compared(compared: Compared) -> Iterator[Row]:
    names = {"a": compared.a.variant, "b": compared.b.variant}
    for at in compared.loads:
        about = {**names, "load": at.load, "pairs": at.pairs, "rounds": at.rounds}
        for metric, ratio in at.ratios.items():
            figures = {
                "metric": metric,
                "of_a": ratio.a,
                "of_b": ratio.b,
                "ratio": ratio.ratio,
                "speedup": ratio.speedup,
            }
            low, high = ratio.bounds or (None, None)
            yield {"kind": "ratio", **about, **figures, "low": low, "high": high, "outcome": outcome(ratio)}
    for others, one in compared.break_evens:
        yield {"kind": "break_even", **names, "load": others, **_of(one)}
    if compared.equality is not None:
        yield {"kind": "equality", **names, "share": compared.equality.share, **_of(compared.equality)}
    said = {"verdict": verdict(compared), "cautions": cautions(compared), "confidence": compared.confidence}
    yield {"kind": "verdict", **names, **said}


def _of(one: msgspec.Struct) -> Row:
    """Its fields; a break-even's own `load` is told as `at`, since a row's load is what was varied."""
    values: Row = {name: msgspec.to_builtins(getattr(one, name)) for name in one.__struct_fields__}
    if "kind" in values:
        values = {"outcome": values.pop("kind"), "at": values.pop("load"), **values}
    return values
