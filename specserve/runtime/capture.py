"""Capturing sets of CUDA graphs: all in one pool of memory, so that they cost little more than the largest of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from specserve.device import Graph, capturing, reserved_memory
from specserve_adapters.pool import AdapterWork
from specserve_kernels.lora.folded import MOST_FOLDED
from specserve_kernels.skinny.linear import MAX_ROWS

Key = tuple[int, AdapterWork]
"""A graph's bucket of rows or tokens, and how much adapters are."""


class GraphSet(Protocol):
    """Steps of one kind."""

    @property
    def graphs(self) -> dict[Key, Graph]:
        """What was captured; `capture` fills it."""

    def works(self, *, with_adapters: bool) -> Mapping[Key, Callable[[], Tensor]]:
        """What each graph is to do again, the largest first: the others reuse its memory."""


def kinds(size: int, *, with_adapters: bool, mixes: bool = False) -> list[AdapterWork]:
    """What batches of a bucket are captured: without adapters, with some, and with many where that is another way:
    products of so few rows add adapters themselves, or `mixes`: steps of many tokens may be prompts' alone or not."""
    if not with_adapters:
        return [AdapterWork.NONE]
    many = size <= MAX_ROWS or (mixes and size > MOST_FOLDED)
    return [kind for kind in AdapterWork if kind is not AdapterWork.MANY or many]


@torch.inference_mode()
def capture(sets: Sequence[GraphSet], device: torch.device, *, with_adapters: bool, progress: bool) -> dict[str, float]:
    """Capture every graph of the sets, those first whose memory others can reuse. What it took: how many graphs,
    seconds, bytes of the device."""
    todo = [(one.graphs, key, work) for one in sets for key, work in one.works(with_adapters=with_adapters).items()]
    compiled = set()
    for graphs, (_, kind), work in todo:
        if (id(graphs), kind) not in compiled:  # compiles most kernels
            work()
            compiled.add((id(graphs), kind))
    begin, before = time.perf_counter(), reserved_memory(device)
    with capturing(device) as pool:
        for graphs, key, work in tqdm(todo, desc="Capturing CUDA graphs", disable=not progress):
            work()  # picks the libraries' kernels for this size
            graphs[key] = Graph(work, pool)
    seconds = round(time.perf_counter() - begin, 2)
    return {"count": len(todo), "seconds": seconds, "bytes": reserved_memory(device) - before}
