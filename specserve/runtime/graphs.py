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

SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then every multiple of 8 up to `max_rows`, which is the
    last. A row of padding costs next to nothing: products read the same weights, and its cache is one token."""
    sizes = (*SMALL_BUCKETS, *range(BUCKET_STEP, max_rows, BUCKET_STEP))
    return [size for size in sizes if size < max_rows] + [max_rows]


def output_bytes(max_rows: int, bytes_per_row: int, *, with_adapters: bool) -> int:
    """What the graphs keep besides the memory that they share: each its own logits."""
    return sum(buckets(max_rows)) * bytes_per_row * (2 if with_adapters else 1)


class DecodeGraphs:
    """`capture` once, then `run` wherever `can_run` says so. `max_context`: no row's KV is ever longer."""

    def __init__(self, target: ModelState, rows: DeviceRows, max_context: int, device: torch.device) -> None:
        self._target = target
        self._rows = rows
        self._max_context = max_context
        self._device = device
        self._layouts: dict[int, StepLayout] = {}  # by bucket; a layout's row_index is its graphs' input
        self._graphs: dict[tuple[int, bool], Graph] = {}  # (bucket, with adapters)
        self._current: dict[int, tuple[int, ...]] = {}  # bucket → the rows that its input holds
        self._bucket_of: list[int] = []  # by number of rows
        self.facts: dict[str, float] = {}  # how many graphs, and what they cost at start

    @torch.inference_mode()
    def capture(self, max_rows: int, adapters: Sequence[bool], *, progress: bool) -> None:
        """One graph a bucket and kind of batch (without and with adapters), the largest first: the others reuse its
        memory."""
        sizes = buckets(max_rows)
        self._bucket_of = [next(size for size in sizes if size >= count) for count in range(max_rows + 1)]
        for size in sizes:
            row_index = torch.full((size,), self._rows.padding_row, device=self._device)
            self._layouts[size] = uniform_layout((self._rows.padding_row,) * size, row_index, 1)
            self._current[size] = ()
        for with_adapters in adapters:
            self._decode(sizes[-1], with_adapters)  # compiles the kernels
        begin, before = time.perf_counter(), reserved_memory(self._device)
        with capturing(self._device) as pool:
            for size in tqdm(sizes[::-1], desc="Capturing CUDA graphs", disable=not progress):
                for with_adapters in adapters:
                    self._decode(size, with_adapters)  # picks the libraries' kernels for this size
                    work = _bind(self._decode, size, with_adapters)
                    self._graphs[size, with_adapters] = Graph(work, pool)
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
        with_adapters = any(self._rows.adapters[row] for row in layout.rows)
        return self._graphs[size, with_adapters].replay()[:count]

    def _decode(self, size: int, with_adapters: bool) -> Tensor:
        bounds = (self._max_context,) * size
        hidden = self._target.forward(self._rows, self._layouts[size], None, bounds, with_adapters=with_adapters)
        return self._target.model.compute_logits(hidden)


def _bind(decode: Callable[[int, bool], Tensor], size: int, with_adapters: bool) -> Callable[[], Tensor]:
    return lambda: decode(size, with_adapters)
