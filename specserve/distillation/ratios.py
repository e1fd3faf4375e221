"""A share over few texts, and how far it may be from that over many."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """Σ parts / Σ wholes over texts. `error` is one standard error, None where there is but one group of texts."""

    value: float
    error: float | None


def ratio(parts: Sequence[float], wholes: Sequence[float], groups: Sequence[Hashable], *, most: float = 1.0) -> Ratio:
    """Ratio of each text's part (tokens accepted, say) to its whole (tokens drafted); 0 where the wholes are. `most`:
    the largest part of a whole of 1.

    Tokens of one text are no independent draws, and neither are texts of one prompt: texts of an equal group count as
    one. With n groups of parts y and wholes x and R = Σy / Σx, the error is √(n / (n - 1) · Σ(y - R·x)²) / Σx, the
    linearised error of a ratio of two means (Cochran, Sampling Techniques, 1977, section 6.3). Two groups may be alike
    by chance, so it is never less than the largest that Σx independent draws from [0, most] have at their mean.
    """
    sums: dict[Hashable, tuple[float, float]] = {}
    for part, whole, group in zip(parts, wholes, groups, strict=True):
        part_before, whole_before = sums.get(group, (0.0, 0.0))
        sums[group] = (part_before + part, whole_before + whole)
    total = math.fsum(wholes)
    if not total:
        return Ratio(0.0, None)
    value = math.fsum(parts) / total
    if len(sums) < 2:
        return Ratio(value, None)
    squares = math.fsum((part - value * whole) ** 2 for part, whole in sums.values())
    among_groups = math.sqrt(len(sums) / (len(sums) - 1) * squares) / total
    mean = (math.fsum(parts) + most) / (total + 2)  # by the rule of succession: none of five is not none for ever
    return Ratio(value, max(among_groups, math.sqrt(mean * (most - mean) / total)))
