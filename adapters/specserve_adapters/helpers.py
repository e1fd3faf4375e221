"""Threads that share the work on one adapter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")
Helpers = ThreadPoolExecutor | None
"""None: nobody helps."""


def make_helpers(count: int) -> ThreadPoolExecutor:
    """`count` threads on each of which torch's operations stay on that thread. They would start a team each otherwise,
    and the engine's thread would wait for a processor."""
    all_started = threading.Barrier(count)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        all_started.wait()

    usual = torch.get_num_threads()
    helpers = ThreadPoolExecutor(count, thread_name_prefix="adapter-helper")
    list(helpers.map(start, range(count)))
    torch.set_num_threads(usual)  # a thread's call decides for threads that start after it as well
    return helpers


def in_parallel(helpers: Helpers, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """[work(item) …], by the helpers if there are any. All work has ended when this does, failed or not: whoever called
    may then give away the memory that it was done in."""
    if helpers is None:
        return [work(item) for item in items]
    begun = [helpers.submit(work, item) for item in items]
    wait(begun)
    return [future.result() for future in begun]
