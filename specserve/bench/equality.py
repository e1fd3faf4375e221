"""Whether two variants answered the same: shares of equal texts, and the first difference, for a person to see."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from specserve.bench.pairs import Both

BEFORE, AFTER = 40, 40  # characters shown around a difference


class Difference(msgspec.Struct, frozen=True):
    index: int  # in the trace
    position: int  # characters that are the same before it
    before: str  # the last of these
    a: str  # how A went on
    b: str


class Equality(msgspec.Struct, frozen=True, omit_defaults=True):
    pairs: int
    equal: int  # texts that are the same from beginning to end
    common: float  # characters before the first difference, of those of the longer text; the mean of pairs
    first: Difference | None = None

    @property
    def share(self) -> float:
        return self.equal / self.pairs


def equality(both: Iterable[Both]) -> Equality | None:
    """Of pairs of answers. None: there are none with a text."""
    pairs = equal = 0
    common = 0.0
    first = None
    for one, other in both:
        if not one.text and not other.text:
            continue  # both empty, or texts were not kept: nothing is known
        pairs += 1
        position = _common(one.text, other.text)
        common += position / max(len(one.text), len(other.text))
        if one.text == other.text:
            equal += 1
        elif first is None or one.index < first.index:
            ends = (text[position : position + AFTER] for text in (one.text, other.text))
            first = Difference(one.index, position, one.text[max(0, position - BEFORE) : position], *ends)
    return Equality(pairs, equal, common / pairs, first) if pairs else None


def _common(one: str, other: str) -> int:
    """Characters before the first difference."""
    places = (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right)
    return next(places, min(len(one), len(other)))
