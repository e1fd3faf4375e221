"""Seeds of requests that bring none."""

from __future__ import annotations

from specserve.config import environment_seed
from specserve.core.seeds import derive_seed


class SeedSource:
    """A sequence that `base` fixes, or the system's entropy where it is None."""

    def __init__(self, base: int | None) -> None:
        self._base = base
        self._count = 0

    def next(self) -> int:
        """A seed in [0, 2^63)."""
        if self._base is None:
            return environment_seed()
        self._count += 1
        return derive_seed(self._base, self._count)
