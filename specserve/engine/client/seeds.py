"""Seeds: each of a request's n samples derives its own, and a request without one gets one at admission."""

from __future__ import annotations

from specserve.config import environment_seed

_MASK = (1 << 64) - 1


def derive_seed(seed: int, index: int) -> int:
    """Seed of sample `index`, in [0, 2^63); sample 0 keeps the request's own, so that n=1 is the first of n.

    SplitMix64's finaliser over seed + index × its increment (Steele, Lea, Flood 2014).
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1


class SeedSource:
    """Seeds of requests that bring none: a sequence that `base` fixes, or the system's entropy."""

    def __init__(self, base: int | None) -> None:
        self._base = base
        self._count = 0

    def next(self) -> int:
        if self._base is None:
            return environment_seed()
        self._count += 1
        return derive_seed(self._base, self._count)
