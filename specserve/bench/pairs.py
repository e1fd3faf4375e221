"""Whose times are compared: one request of a trace, sent to both variants in the same round and under the same load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specserve.bench.records import Load, RequestRecord, RunRecord

Both = tuple[RequestRecord, RequestRecord]  # of A, of B
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Two variants under one load. Pairs are requests that succeeded with both."""

    both: list[Both]
    rounds: Numbers  # [pairs], from 0 without gaps
    requests: Numbers  # [pairs], from 0 without gaps; the same number: the same request of the trace
    blocks: list[tuple[list[RunRecord], list[RunRecord]]]  # [rounds run to their end by both], of A, of B
    failed: tuple[int, int]  # requests of A, of B

    @property
    def num_rounds(self) -> int:
        return len(set(self.rounds.tolist()))


def by_load(runs: Sequence[RunRecord]) -> list[tuple[Load, list[RunRecord]]]:
    """Runs under the same load together, the least load first."""
    groups: dict[tuple[tuple[str, float | int | str], ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.load.items())), []).append(run)
    found = [(group[0].load, group) for group in groups.values()]
    return sorted(found, key=lambda one: [_order(one[0][name]) for name in one[0]])


def pair(runs: Sequence[RunRecord], a: str, b: str) -> Pairs:
    """Of the runs under one load."""
    sides = [_by_round(runs, variant) for variant in (a, b)]
    both: list[Both] = []
    rounds: list[int] = []
    blocks = []
    for number in sorted(set(sides[0]) & set(sides[1])):
        ours, theirs = (side[number] for side in sides)
        found = _succeeded(ours), _succeeded(theirs)
        shared = [index for index in found[0] if index in found[1]]
        both += [(found[0][index], found[1][index]) for index in shared]
        rounds += [number] * len(shared)
        if all(run.complete and run.duration > 0 for run in (*ours, *theirs)):
            blocks.append((ours, theirs))
    failed = [
        sum(one.error is not None for runs in side.values() for run in runs for one in run.requests) for side in sides
    ]
    return Pairs(both, _numbered(rounds), _numbered([one.index for one, _ in both]), blocks, (failed[0], failed[1]))


def only(pairs: Pairs, places: Numbers) -> Pairs:
    """Some of the pairs, without the runs that they are parts of."""
    both = [pairs.both[place] for place in places.tolist()]
    return Pairs(both, _numbered(pairs.rounds[places]), _numbered(pairs.requests[places]), [], (0, 0))


def _by_round(runs: Sequence[RunRecord], variant: str) -> dict[int, list[RunRecord]]:
    found: dict[int, list[RunRecord]] = {}
    for run in runs:
        if run.variant == variant:
            found.setdefault(run.round, []).append(run)
    return found


def _succeeded(runs: Sequence[RunRecord]) -> dict[int, RequestRecord]:
    return {one.index: one for run in runs for one in run.requests if one.error is None}


def _numbered(values: Sequence[int] | Numbers) -> Numbers:
    return np.unique(np.asarray(values, dtype=np.int64), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _order(value: float | int | str) -> tuple[bool, float, str]:
    """Numbers before words, by size."""
    return (True, 0.0, value) if isinstance(value, str) else (False, float(value), "")
