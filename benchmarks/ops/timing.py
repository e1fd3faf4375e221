"""How long a call takes, and how fast this device can be at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.ops.case import Call

CALLS = 20
REPLAYS = 9


def micros(calls: Sequence[Call], device: torch.device) -> float:
    """Median time of one of `calls` in µs: of replays of a CUDA graph of at least CALLS, by wall clock on a CPU."""
    if device.type != "cuda":
        return _wall_micros(calls)
    calls = list(calls) * -(-CALLS // len(calls))
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls:  # every one: a kernel may have one form for the first and another for the rest
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call() for call in calls]  # else each result would lie where the one before it lay, in the cache
    graph.replay()
    begins, ends = ([_event() for _ in range(REPLAYS)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    del kept
    times = [float(begin.elapsed_time(end)) for begin, end in zip(begins, ends, strict=True)]
    return statistics.median(times) * 1e3 / len(calls)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_micros(calls: Sequence[Call]) -> float:
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes moved, and floating-point operations of a bfloat16 product, a second."""

    copy: float
    product: float

    def floor_micros(self, size: float, flops: float) -> float:
        """The least time in µs of a call that moves `size` bytes and computes `flops` operations."""
        return max(size / self.copy, flops / self.product) * 1e6


def measure_rates(device: torch.device) -> Rates:
    """Of a large copy and a large product on this device."""
    numel, side = (1 << 29, 8192) if device.type == "cuda" else (1 << 20, 256)
    source = torch.empty(numel, device=device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copied = micros([lambda: torch.neg(source, out=target)], device)  # a kernel: copies by the engine are slower
    a, b = source[: side * side].view(side, side), source[-side * side :].view(side, side)
    product = torch.empty_like(a)
    multiplied = micros([lambda: torch.mm(a, b, out=product)], device)
    return Rates(2 * source.nbytes / copied * 1e6, 2 * side**3 / multiplied * 1e6)
