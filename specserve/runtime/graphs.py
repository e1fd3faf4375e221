"""The target's decode step as CUDA graphs: one for each bucket of rows, from row numbers to logits.

A graph reads everything but the row numbers from the device rows, so a steady decode sends nothing to the device. Rows
beyond a step's own are the padding row, whose one token in block 0 nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from specserve.core.plan import PlanRow
from specserve.device import Graph
from specserve.runtime.capture import Key, kinds
from specserve.runtime.layout import StepLayout, uniform_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork

SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, then every multiple of 8 up to `max_rows`, which is the
    last. A row of padding costs next to nothing: products read the same weights, and its cache is one token."""
    sizes = (*SMALL_BUCKETS, *range(BUCKET_STEP, max_rows, BUCKET_STEP))
    return [size for size in sizes if size < max_rows] + [max_rows]


def output_bytes(max_rows: int, bytes_per_row: int, *, with_adapters: bool) -> int:
    """What the graphs keep besides the memory that they share: each its own logits."""
    return bytes_per_row * sum(size * len(kinds(size, with_adapters=with_adapters)) for size in buckets(max_rows))


class DecodeGraphs:
    """Once captured, `run` wherever `can_run` says so. `max_context`: no row's KV is ever longer."""

    def __init__(self, target: ModelState, rows: DeviceRows, *, max_rows: int, max_context: int) -> None:
        self._target = target
        self._rows = rows
        self._max_context = max_context
        self._sizes = buckets(max_rows)
        self._bucket_of = [next(size for size in self._sizes if size >= count) for count in range(max_rows + 1)]
        self._layouts: dict[int, StepLayout] = {}  # by bucket; a layout's row_index is its graphs' input
        self._current: dict[int, tuple[int, ...]] = {}  # bucket → the rows that its input holds
        self.graphs: dict[Key, Graph] = {}
        for size in self._sizes:
            row_index = rows.num_tokens.new_full((size,), rows.padding_row)
            self._layouts[size] = uniform_layout((rows.padding_row,) * size, row_index, 1)
            self._current[size] = ()

    def works(self, *, with_adapters: bool) -> dict[Key, Callable[[], Tensor]]:
        """What each graph does."""
        return {
            (size, kind): partial(self._decode, size, kind)
            for size in self._sizes[::-1]
            for kind in kinds(size, with_adapters=with_adapters)
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
        graph = self.graphs.get((size, kind)) or self.graphs[size, AdapterWork.SOME]
        return graph.replay()[:count]

    def _decode(self, size: int, kind: AdapterWork) -> Tensor:
        bounds = (self._max_context,) * size
        hidden = self._target.forward(self._rows, self._layouts[size], None, bounds, work=kind)
        return self._target.model.compute_logits(hidden)
