"""Which combinations a law runs over: a pairwise cover every time, the full product on demand."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import pytest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
PROPOSERS = (
    "near_draft", "narrow_draft", "ngram", "suffix", "ngram+near_draft", "suffix+near_draft",
    "oracle", "wrong", "random",
)  # fmt: skip
MODES = ("greedy-rejection", "greedy-coupled", "sampled-coupled")
DEPTHS = (1, 2)
MIXES = ("base", "identical", "distinct", "zipf", "overflow", "summed", "scaled")


@dataclass(frozen=True)
class Case:
    """One point of the product. `mode` = how tokens are chosen, and the verification method."""

    family: str
    proposer: str
    mode: str
    depth: int
    mix: str

    @property
    def sampled(self) -> bool:
        return self.mode.startswith("sampled")

    @property
    def method(self) -> str:
        return self.mode.split("-")[1]

    def __str__(self) -> str:
        return f"{self.family}-{self.proposer}-{self.mode}-depth{self.depth}-{self.mix}"


AXES: Mapping[str, Sequence[object]] = {
    "family": FAMILIES,
    "proposer": PROPOSERS,
    "mode": MODES,
    "depth": DEPTHS,
    "mix": MIXES,
}


def pairwise(axes: Mapping[str, Sequence[object]]) -> list[tuple[object, ...]]:
    """Rows of the product such that each pair of values of two axes occurs in at least one.

    Greedy: again and again the row that covers most uncovered pairs, the first of them in the product's order.
    """
    rows = list(product(*axes.values()))
    pairs_of = {row: {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)} for row in rows}
    uncovered = set().union(*pairs_of.values())
    cover = []
    while uncovered:
        best = max(rows, key=lambda row: len(pairs_of[row] & uncovered))
        uncovered -= pairs_of[best]
        cover.append(best)
    return cover


def over(**axes: Sequence[object]) -> pytest.MarkDecorator:
    """Parametrise a law over the product of these axes; what lies outside the pairwise cover is marked `laws_full`."""
    return cases(axes, pairwise(axes))


def cases(axes: Mapping[str, Sequence[object]], cover: Collection[tuple[object, ...]]) -> pytest.MarkDecorator:
    """Parametrise a law over the product of these axes; what lies outside `cover` is marked `laws_full`."""
    rows = list(product(*axes.values()))
    assert set(cover) <= set(rows)
    params = [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if row in cover else pytest.mark.laws_full)
        for row in rows
    ]
    return pytest.mark.parametrize(",".join(axes), params)


def law_cases(**fewer: Sequence[object]) -> pytest.MarkDecorator:
    """Parametrise a law by `case` over all axes; `fewer` replaces the values of some."""
    axes = dict(AXES) | fewer
    cover = {Case(*row) for row in pairwise(axes)}
    cases = [Case(*row) for row in product(*axes.values())]
    return pytest.mark.parametrize(
        "case",
        [pytest.param(c, id=str(c), marks=() if c in cover else pytest.mark.laws_full) for c in cases],
    )
