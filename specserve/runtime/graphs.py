"""The target's decode step as CUDA graphs: one for each bucket of rows, from row numbers to logits.

A graph reads everything but the row numbers from the device rows, so a steady decode sends nothing to the device. Rows
beyond a step's own are the padding row, whose one token in block 0 nobody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from specserve.core.plan import PlanRow
from specserve.device import Graph, capturing, reserved_memory
from specserve.runtime.layout import StepLayout, uniform_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork
from specserve_kernels.skinny.linear import MAX_ROWS

SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then every multiple of 8 up to `max_rows`, which is the
    last. A row of padding costs next to nothing: products read the same weights, and its cache is one token."""
    sizes = (*SMALL_BUCKETS, *range(BUCKET_STEP, max_rows, BUCKET_STEP))
    return [size for size in sizes if size < max_rows] + [max_rows]


def kinds(size: int, *, with_adapters: bool) -> list[AdapterWork]:
    """What batches of a bucket are captured: without adapters, with some, and with many where products of so few rows
    add adapters themselves."""
    if not with_adapters:
        return [AdapterWork.NONE]
    return [kind for kind in AdapterWork if kind is not AdapterWork.MANY or size <= MAX_ROWS]


def output_bytes(max_rows: int, bytes_per_row: int, *, with_adapters: bool) -> int:
    """What the graphs keep besides the memory that they share: each its own logits."""
    return bytes_per_row * sum(size * len(kinds(size, with_adapters=with_adapters)) for size in buckets(max_rows))


class DecodeGraphs:
    """`capture` once, then `run` wherever `can_run` says so. `max_context`: no row's KV is ever longer."""

    def __init__(self, target: ModelState, rows: DeviceRows, max_context: int, device: torch.device) -> None:
        self._target = target
        self._rows = rows
        self._max_context = max_context
        self._device = device
        self._layouts: dict[int, StepLayout] = {}  # by bucket; a layout's row_index is its graphs' input
        self._graphs: dict[tuple[int, AdapterWork], Graph] = {}  # (bucket, how much adapters are)
        self._current: dict[int, tuple[int, ...]] = {}  # bucket → the rows that its input holds
        self._bucket_of: list[int] = []  # by number of rows
        self.facts: dict[str, float] = {}  # how many graphs, and what they cost at start

    @torch.inference_mode()
    def capture(self, max_rows: int, *, with_adapters: bool, progress: bool) -> None:
        """One graph a bucket and kind of batch, the largest first: the others reuse its memory."""
        sizes = buckets(max_rows)
        self._bucket_of = [next(size for size in sizes if size >= count) for count in range(max_rows + 1)]
        for size in sizes:
            row_index = torch.full((size,), self._rows.padding_row, device=self._device)
            self._layouts[size] = uniform_layout((self._rows.padding_row,) * size, row_index, 1)
            self._current[size] = ()
        for kind in kinds(sizes[-1], with_adapters=with_adapters):
            self._decode(sizes[-1], kind)  # compiles the kernels
        begin, before = time.perf_counter(), reserved_memory(self._device)
        with capturing(self._device) as pool:
            for size in tqdm(sizes[::-1], desc="Capturing CUDA graphs", disable=not progress):
                for kind in kinds(size, with_adapters=with_adapters):
                    self._decode(size, kind)  # picks the libraries' kernels for this size
                    self._graphs[size, kind] = Graph(_bind(self._decode, size, kind), pool)
        self.facts = {
            "count": len(self._graphs),
            "seconds": round(time.perf_counter() - begin, 2),
            "bytes": reserved_memory(self._device) - before,
        }

    def can_run(self, plan_rows: Sequence[PlanRow]) -> bool:
        """Whether every row of the step decodes one token."""
        return len(plan_rows) < len(self._bucket_of) and all(
            row.start is None and not row.num_drafts for row in plan_rows
        )

    def run(self, layout: StepLayout) -> Tensor:
        """Logits [B, vocab] of the rows' next tokens; they hold until the next run."""
        count = len(layout.rows)
        size = self._bucket_of[count]
        if self._current[size] != layout.rows:
            row_index = self._layouts[size].row_index
            row_index[:count].copy_(layout.row_index)
            if count < len(self._current[size]):
                row_index[count:].fill_(self._rows.padding_row)
            self._current[size] = layout.rows
        kind = self._target.adapter_work(self._rows, layout)
        graph = self._graphs.get((size, kind)) or self._graphs[size, AdapterWork.SOME]
        return graph.replay()[:count]

    def _decode(self, size: int, kind: AdapterWork) -> Tensor:
        bounds = (self._max_context,) * size
        hidden = self._target.forward(self._rows, self._layouts[size], None, bounds, work=kind)
        return self._target.model.compute_logits(hidden)


def _bind(decode: Callable[[int, AdapterWork], Tensor], size: int, kind: AdapterWork) -> Callable[[], Tensor]:
    return lambda: decode(size, kind)
