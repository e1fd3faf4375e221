"""All that is found out by comparing two variants: figures, ratios, break-even, equality of answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from specserve.bench.break_even import BreakEven, break_even
from specserve.bench.equality import Equality, equality
from specserve.bench.metrics import Slos, Summary, summarise
from specserve.bench.pairs import Pairs, by_load, pair
from specserve.bench.records import Comparison, Load, RunRecord, VariantInfo
from specserve.bench.stats import Ratio, ratios

HEADLINE = "mean_e2el_ms"  # at a given concurrency it is what throughput is, at a given rate throughput is the rate
AXES = ("concurrency", "rate")  # what a break-even is looked for along


class AtLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """Two variants under one load."""

    load: Load
    a: Summary  # of all requests, paired or not
    b: Summary
    pairs: int
    rounds: int
    ratios: dict[str, Ratio]  # by metric; those without a figure on one side are left out
    failed: tuple[int, int] = (0, 0)
    complete: bool = True  # False: runs were cut short, or one side lacks them

    @property
    def headline(self) -> Ratio | None:
        return self.ratios.get(HEADLINE)


class Compared(msgspec.Struct, frozen=True, omit_defaults=True):
    """B beside A. `loads` come in their order, least first."""

    a: VariantInfo
    b: VariantInfo
    loads: list[AtLoad]
    break_evens: list[tuple[Load, BreakEven]]  # one for each choice of what else was varied
    equality: Equality | None = None
    confidence: float = 0.95

    @property
    def varied(self) -> list[str]:
        return varied(at.load for at in self.loads)


def compare(comparison: Comparison, a: str, b: str, slos: Slos | None = None, confidence: float = 0.95) -> Compared:
    """B beside A, by their names. Loads that only one of them was measured under are left out."""
    infos = {info.variant: info for info in comparison.variants}
    runs = [run for run in comparison.runs if run.variant in (a, b)]
    found = [(load, group, pair(group, a, b)) for load, group in by_load(runs)]
    loads = [
        _at(load, group, pairs, a, b, slos, confidence)
        for load, group, pairs in found
        if {run.variant for run in group} == {a, b}
    ]
    texts = equality(one for _, _, pairs in found for one in pairs.both)
    return Compared(infos[a], infos[b], loads, break_evens(loads, confidence), texts, confidence)


def comparisons(comparison: Comparison, slos: Slos | None = None, confidence: float = 0.95) -> list[Compared]:
    """Every other variant beside the first one."""
    first, *others = (info.variant for info in comparison.variants)
    return [compare(comparison, first, other, slos, confidence) for other in others]


def varied(loads: Iterable[Load]) -> list[str]:
    """What differs between loads, by name."""
    all_loads = list(loads)
    names = {name: None for load in all_loads for name in load}
    return [name for name in names if len({load.get(name) for load in all_loads}) > 1]


def along(loads: Sequence[AtLoad], axis: str) -> list[tuple[Load, list[AtLoad]]]:
    """Loads that differ in `axis` alone, as lines of a picture: (what else was varied, loads with a number there)."""
    others = [name for name in varied(at.load for at in loads) if name != axis]
    groups: dict[tuple[tuple[str, float | int | str | None], ...], list[AtLoad]] = {}
    for at in loads:
        if isinstance(at.load.get(axis), int | float):
            groups.setdefault(tuple((name, at.load.get(name)) for name in others), []).append(at)
    return [({name: value for name, value in key if value is not None}, group) for key, group in groups.items()]


def break_evens(loads: Sequence[AtLoad], confidence: float) -> list[tuple[Load, BreakEven]]:
    found = []
    for axis in AXES:
        for others, group in along(loads, axis):
            points = [(float(at.load[axis]), at.headline) for at in group]
            known = [(load, ratio) for load, ratio in points if ratio is not None]
            one = break_even(axis, known, confidence)
            if one is not None:
                found.append((others, one))
    return found


def _at(
    load: Load, runs: Sequence[RunRecord], pairs: Pairs, a: str, b: str, slos: Slos | None, confidence: float
) -> AtLoad:
    sides = [[run for run in runs if run.variant == name] for name in (a, b)]
    rounds = [{run.round for run in side} for side in sides]
    return AtLoad(
        load,
        summarise(sides[0], slos),
        summarise(sides[1], slos),
        pairs=len(pairs.both),
        rounds=pairs.num_rounds,
        ratios={ratio.metric: ratio for ratio in ratios(pairs, slos, confidence)},
        failed=pairs.failed,
        complete=all(run.complete for run in runs) and rounds[0] == rounds[1],
    )
