"""Checkpoint tensors, mapped from their files, → parameters, on threads: some read while others write.

Tensors go in pieces of rows. For a GPU a piece is read into page-locked memory, already in the parameter's dtype, and
copied from there at the bus's speed: a copy straight from a mapped file waits for the disk page by page, and the bus
waits with it. On a CPU a piece is a few rows: where a parameter lies transposed, a column of few rows is read from
cache, not from memory. Beside the model, memory holds a few pieces, so does quantising, which goes piece by piece; the
files' pages are the system's cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from specserve.layers.storage import Parameter

THREADS = 4
PIECE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 25}


def transfer(tensors: Iterable[tuple[Parameter, Tensor]], advance: Callable[[int], object]) -> None:
    """Load each tensor into its parameter, whose shape it has; dtypes and devices may differ.

    `advance` gets the number of bytes of each piece of a parameter that is filled. Tensors are taken a few pieces
    ahead.
    """
    waiting: deque[Future[int]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="load") as pool:
        for parameter, tensor in tensors:
            for part, rows in _pieces(parameter, tensor):
                waiting.append(pool.submit(_load, part, rows))
                if len(waiting) > 2 * THREADS:
                    advance(waiting.popleft().result())
        while waiting:
            advance(waiting.popleft().result())


def _pieces(parameter: Parameter, tensor: Tensor) -> Iterator[tuple[Parameter, Tensor]]:
    """The parameter and its tensor, cut alike along their first dimension."""
    destination = parameter.destination
    limit = PIECE_BYTES.get(destination.device.type, PIECE_BYTES["cuda"])
    if destination.nbytes <= limit or tuple(destination.shape) != parameter.shape:  # what is repeated is small
        yield parameter, tensor
        return
    step = max(1, limit // destination[0].nbytes)
    for first in range(0, len(tensor), step):
        yield parameter.rows(first, first + step), tensor[first : first + step]


@torch.inference_mode()  # a caller's would not reach this thread, and its parameters could not be written without
def _load(parameter: Parameter, tensor: Tensor) -> int:
    destination = parameter.destination
    if destination.device.type != "cpu":
        # torch keeps page-locked memory for the next piece of this size. What is quantised travels as it is.
        dtype = destination.dtype if parameter.scales is None else tensor.dtype
        tensor = torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor)
    parameter.load(tensor)
    return parameter.nbytes
