"""One buffer for everything that a step tells the device: int64 arrays side by side, moved by one copy.

Each array begins at a multiple of 16 bytes, as what torch allocates does: kernels are compiled apart for pointers that
do not, and somebody would wait for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specserve.device import upload

Ints = np.ndarray[Any, np.dtype[np.int64]]
_WORDS = 2  # of int64 in 16 bytes


class Packer:
    """Add arrays, upload once, then take each array's tensor by the handle that `add` gave."""

    def __init__(self) -> None:
        self._parts: list[Ints] = []
        self._size = 0
        self._words: Tensor | None = None

    def add(self, values: Ints | Sequence[int]) -> slice:
        """Handle of a 1-D array of int64."""
        part = np.asarray(values, dtype=np.int64)
        begin, rest = self._size, -part.size % _WORDS
        self._parts += [part, np.zeros(rest, dtype=np.int64)]
        self._size += part.size + rest
        return slice(begin, begin + part.size)

    def upload(self, device: torch.device) -> None:
        """Start the copy; nobody waits for it."""
        if self._size:
            self._words = upload(np.concatenate(self._parts), device)

    def __getitem__(self, handle: slice) -> Tensor:
        assert self._words is not None, "upload comes first"
        return self._words[handle]
