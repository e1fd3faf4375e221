"""Which request gets which adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence

from specserve.bench.options import Assignment

SKEW = 1.5


def assign(
    count: int, names: Sequence[str], assignment: Assignment, rng: random.Random, *, exponent: float = 1.0
) -> list[str | None]:
    """The adapter of each of `count` requests, drawn independently (but for round-robin); None each without names.

    Names are ordered from the most popular one: zipf draws the i-th (from 1) with p ∝ i^-exponent, skewed with
    p ∝ 1.5^-i as Punica's "skewed" (Chen et al. 2023, arXiv 2310.18547, §7), random and uniform all alike.
    """
    if not names:
        return [None] * count
    if assignment == "round-robin":
        return [names[index % len(names)] for index in range(count)]
    return list(rng.choices(names, [_weight(assignment, rank, exponent) for rank in range(len(names))], k=count))


def _weight(assignment: Assignment, rank: int, exponent: float) -> float:
    """Of the `rank`-th name, from 0."""
    if assignment == "zipf":
        return float((rank + 1) ** -exponent)
    return float(SKEW**-rank) if assignment == "skewed" else 1.0
