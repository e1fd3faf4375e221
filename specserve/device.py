"""The one module that names torch.cuda: which device, how much memory, copies that nobody waits for, graphs.

On a CPU everything here is immediate: a copy is the array itself, and waiting for it costs nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU computes with e4m3 floats of one byte: compute capability 8.9 and later."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def free_memory(device: torch.device, utilization: float) -> int:
    """Bytes of a GPU that may still be taken if `utilization` of all its memory is ours to use.

    What torch keeps cached from earlier work is given back first, so that it counts as free.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1.0 - utilization) * total))


def peak_memory(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that `work` takes on a GPU at its worst moment, beyond what was taken before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reserved_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process holds for tensors, in use or not; graphs' own memory is among them."""
    torch.cuda.synchronize(device)
    return torch.cuda.memory_reserved(device)


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array on `device`. On a GPU it travels through page-locked memory and the caller does not wait: torch's
    allocator of such memory keeps each piece until the copy out of it is done."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host; they arrive after everything that was queued before them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = tensors
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._copies = tuple(_to_pinned(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


class SideStream:
    """A second queue of work on a GPU, for copies into memory that no work on the main one reads meanwhile. On a CPU
    work is done as it comes, in whatever queue."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is queued inside goes here, behind all that either queue was given before. The main one goes on."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """A mark behind all that this queue was given so far."""
        return Mark(self._stream)


class Mark:
    """A place in a queue of work."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._event: torch.cuda.Event | None = None
        if stream is not None:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    def passed(self) -> bool:
        """Whether all work before it is done. Never waits."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Graph:
    """Work captured once and replayed with whatever its input tensors hold then (a CUDA graph)."""

    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        """`work` must have run before: capturing compiles nothing. Graphs of one `pool` share memory, so the output
        of one holds until the next one is replayed."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = work()

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._output


@contextmanager
def capturing(device: torch.device) -> Iterator[Any]:
    """Yields the pool for graphs that are captured inside. Garbage is collected once before, not between captures."""
    gc.collect()
    torch.cuda.synchronize(device)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield torch.cuda.graph_pool_handle()
    finally:
        if was_enabled:
            gc.enable()
        torch.cuda.synchronize(device)
