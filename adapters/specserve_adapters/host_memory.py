"""Memory of the host tier. Page-locked memory is taken from the system in a few large pieces and parted here.

Locking pages takes 115 ms for 256 MiB, in the driver, and whoever launches work meanwhile waits for it: steps of 5 ms
took up to 125 (an H200). torch's own allocator of such memory would do it for each adapter that is larger than those
that left, and rounds every size up to a power of two. So all pieces are taken at the start, 2 GiB a second, and stay.
"""

from __future__ import annotations

import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 256 << 20
_ALIGNMENT = 256


class Region(NamedTuple):
    """Bytes of a piece (None: of nobody's, freed with the tensor). `memory` may be shorter than what was taken."""

    memory: Tensor
    piece: int | None
    start: int
    size: int


def _page_locked(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class HostMemory:
    """Room for adapters of `max_bytes` together and for those that are being read, page-locked with `pin`; a piece
    holds any of up to `largest` bytes.

    May be called from several threads.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        pin: bool,
        piece_bytes: int | None = None,
        largest: int = 0,
        allocate: Callable[[int], Tensor] = _page_locked,
    ) -> None:
        small = 1 << max(20, (max_bytes - 1).bit_length())
        self._pin = pin
        self._piece_bytes = piece_bytes = piece_bytes or min(max(PIECE_BYTES, 1 << largest.bit_length()), small)
        self._allocate = allocate
        count = -(-max_bytes // piece_bytes) + 1 if pin else 0  # that one for what is read before something else goes
        self._pieces = [allocate(piece_bytes) for _ in range(count)]
        self._gaps = [[(0, piece_bytes)] for _ in range(count)]  # (start, size), in order, never two adjacent
        self._returned: deque[tuple[int, int, int]] = deque()  # (piece, start, size) of dead adapters
        self._lock = threading.Lock()

    def take(self, size: int) -> Region:
        """`size` bytes, aligned to 256. Freed by `free`, or with whatever they are bound to."""
        if not self._pin:
            return Region(torch.empty(size, dtype=torch.uint8), None, 0, size)
        taken = max(_ALIGNMENT, -(-size // _ALIGNMENT) * _ALIGNMENT)
        if taken <= self._piece_bytes:
            with self._lock:
                self._take_back()
                region = self._first_fit(size, taken)
                if region is not None:
                    return region
        # Larger than a piece, or beside a full budget that is in pieces too small: torch keeps what is freed of these.
        return Region(self._allocate(size), None, 0, size)

    def bind(self, region: Region, owner: object) -> None:
        """Free the region when `owner` dies: at any moment, in any thread, so nothing is locked then."""
        if region.piece is not None:
            place = (region.piece, region.start, region.size)
            weakref.finalize(owner, self._returned.append, place).atexit = False

    def free(self, region: Region) -> None:
        """Give a region back."""
        if region.piece is not None:
            self._returned.append((region.piece, region.start, region.size))

    def free_bytes(self) -> int:
        """What is left in the pieces."""
        with self._lock:
            self._take_back()
            return sum(size for gaps in self._gaps for _, size in gaps)

    def _first_fit(self, size: int, taken: int) -> Region | None:
        for piece, gaps in enumerate(self._gaps):
            for index, (start, gap) in enumerate(gaps):
                if gap >= taken:
                    gaps[index : index + 1] = [(start + taken, gap - taken)] if gap > taken else []
                    return Region(self._pieces[piece][start : start + size], piece, start, taken)
        return None

    def _take_back(self) -> None:
        while self._returned:
            piece, start, size = self._returned.popleft()
            gaps = self._gaps[piece]
            insort(gaps, (start, size))
            index = gaps.index((start, size))
            for left in (index, index - 1):  # the gap behind, then the one before
                if 0 <= left < len(gaps) - 1 and sum(gaps[left]) == gaps[left + 1][0]:
                    gaps[left : left + 2] = [(gaps[left][0], gaps[left][1] + gaps[left + 1][1])]
