"""How many threads a CPU forward runs best with, found by measuring it.

A small model's products are shorter than the barrier that ends them, and on a busy machine that barrier waits for
whichever thread was put aside: more threads can be a hundred times slower. A large model wants them all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

RUNS = 7
WORTHWHILE = 0.85  # twice the threads must take at most this share of the time


def fastest_thread_count(forward: Callable[[], None], most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Double the threads from 1 towards `most` as long as that is worthwhile; the process is left as it was."""
    best, best_time = 1, _median_seconds(forward, 1, clock)
    while best < most:
        more = min(2 * best, most)
        seconds = _median_seconds(forward, more, clock)
        if seconds > WORTHWHILE * best_time:
            break
        best, best_time = more, seconds
    return best


def _median_seconds(forward: Callable[[], None], threads: int, clock: Callable[[], float]) -> float:
    with _threads(threads):
        forward()  # the pool starts, pages are touched
        return statistics.median(_seconds(forward, clock) for _ in range(RUNS))


def _seconds(forward: Callable[[], None], clock: Callable[[], float]) -> float:
    begin = clock()
    forward()
    return clock() - begin


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
