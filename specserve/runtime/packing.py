"""One buffer for everything that a step tells the device: int64 arrays side by side, moved by one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specserve.device import upload

Ints = np.ndarray[Any, np.dtype[np.int64]]


class Packer:
    """Add arrays, upload once, then take each array's tensor by the handle that `add` gave."""

    def __init__(self) -> None:
        self._parts: list[Ints] = []
        self._size = 0
        self._words: Tensor | None = None

    def add(self, values: Ints | Sequence[int]) -> slice:
        """Handle of a 1-D array of int64."""
        part = np.asarray(values, dtype=np.int64)
        begin = self._size
        self._parts.append(part)
        self._size += part.size
        return slice(begin, self._size)

    def upload(self, device: torch.device) -> None:
        """Start the copy; nobody waits for it."""
        if self._size:
            self._words = upload(np.concatenate(self._parts), device)

    def __getitem__(self, handle: slice) -> Tensor:
        assert self._words is not None, "upload comes first"
        return self._words[handle]
