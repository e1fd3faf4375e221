"""What drafts give by how many of them are accepted: requests in groups of like acceptance α."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from specserve.bench.pairs import Pairs, by_load, only, pair
from specserve.bench.records import Load, RequestRecord, RunRecord
from specserve.bench.stats import MIN_PAIRS, Ratio, ratios

GROUPS = 4  # at most, of one load
METRIC = "mean_tpot_ms"  # what drafts speed up; the prompt's time has nothing of it


class Gains(NamedTuple):
    drafter: str  # B, or A where B drafted nothing at all
    lines: list[tuple[Load, list[tuple[float, Ratio]]]]  # by α: a group's accepted drafts of its drafts


def gains(runs: Sequence[RunRecord], a: str, b: str, confidence: float = 0.95) -> Gains:
    """Of each load with two groups at least."""
    found = [(load, pair(group, a, b)) for load, group in by_load([run for run in runs if run.variant in (a, b)])]
    side = int(any(sum(both[1].drafted_per_position) for _, pairs in found for both in pairs.both))
    lines = [(load, _points(pairs, side, confidence)) for load, pairs in found]
    return Gains((a, b)[side], [(load, points) for load, points in lines if len(points) > 1])


def _points(pairs: Pairs, side: int, confidence: float) -> list[tuple[float, Ratio]]:
    places = [place for place, both in enumerate(pairs.both) if sum(both[side].drafted_per_position)]
    ordered = sorted(places, key=lambda place: _share([pairs.both[place][side]]))
    groups = np.array_split(np.array(ordered, dtype=np.int64), max(1, min(GROUPS, len(ordered) // MIN_PAIRS)))
    found = []
    for group in groups:
        own = only(pairs, group)
        ratio = next((one for one in ratios(own, confidence=confidence) if one.metric == METRIC), None)
        if ratio is not None:
            found.append((_share([both[side] for both in own.both]), ratio))
    return found


def _share(records: Sequence[RequestRecord]) -> float:
    drafted = sum(sum(record.drafted_per_position) for record in records)
    return sum(sum(record.accepted_per_position) for record in records) / drafted
