"""Which request gets which adapter. Adapters are numbered from the most popular one, a0.

`identical`, `distinct`, `uniform` and `skewed` are the mixes of Punica (Chen et al. 2023, arXiv 2310.18547, §7), for a
batch of n requests: all on one adapter; each on its own; ⌈√n⌉ adapters, equally popular; each adapter 1.5 times as
popular as the next. `zipf1.0` draws each request's adapter with p(i) ∝ (i + 1)^-s, s = 1.0, of all that there are;
`base` has none. Every mix is the same each time for its n, and in no order within the batch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SKEW = 1.5


@dataclass(frozen=True, slots=True)
class Mix:
    """One mix over `loras` adapters."""

    name: str
    loras: int

    def adapters(self, batch: int) -> list[str | None]:
        """Each request's adapter, by name."""
        if self.name == "base":
            return [None] * batch
        rng = random.Random(batch)
        numbers = self._numbers(batch, rng)
        rng.shuffle(numbers)
        return [f"a{number}" for number in numbers]

    def _numbers(self, batch: int, rng: random.Random) -> list[int]:
        if self.name == "identical":
            return [0] * batch
        if self.name == "distinct":
            if batch > self.loras:
                raise SystemExit(f"{batch} requests on distinct adapters need as many, and there are {self.loras}.")
            return list(range(batch))
        if self.name == "uniform":
            return shares([1.0] * min(self.loras, math.isqrt(batch - 1) + 1), batch)
        if self.name == "skewed":
            return shares([SKEW**-number for number in range(self.loras)], batch)
        found = re.fullmatch(r"zipf(\d+(?:\.\d+)?)", self.name)
        if found is None:
            raise SystemExit(f"{self.name!r} is none of base, identical, distinct, uniform, skewed, zipf1.0.")
        return zipf(batch, self.loras, float(found[1]), rng)


@dataclass(frozen=True, slots=True)
class Listed:
    """A batch that is given as it is."""

    names: tuple[str | None, ...]

    def adapters(self, batch: int) -> list[str | None]:
        assert batch == len(self.names)
        return list(self.names)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` numbers, each i as often as its weight says: whole quotas, then the largest remainders."""
    quotas = [weight * count / sum(weights) for weight in weights]
    each = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: (each[i] - quotas[i], i))
    for number in by_remainder[: count - sum(each)]:
        each[number] += 1
    return [number for number, times in enumerate(each) for _ in range(times)]


def zipf(count: int, loras: int, s: float, rng: random.Random) -> list[int]:
    """`count` numbers below `loras`, drawn with p(i) ∝ (i + 1)^-s."""
    weights = list(accumulate((number + 1) ** -s for number in range(loras)))
    return rng.choices(range(loras), cum_weights=weights, k=count)
