"""StepLayout: where each token of a forward comes from, as index tensors that depend on host-known shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specserve.core.plan import PlanRow
from specserve.runtime.packing import Packer


@dataclass(frozen=True, slots=True, eq=False)
class StepLayout:
    """B sequences of `query_lens` tokens laid one after another, T in all; sequence b belongs to device row `rows[b]`.

    row_index [B], query_start [B + 1] (the first token of each; the last entry is T), token_rows [T] (the device row of
    a token), positions [T] (its place in the row's history; negative: counted from the row's last token on, see
    specserve_kernels.inputs): int64 on the device.

    A ragged layout has query_lens None: lengths are in query_start alone, none above `max_query_len`. Sequences without
    tokens come last, and the last entry of query_start is then how many of the T tokens belong to any.
    """

    rows: tuple[int, ...]
    query_lens: tuple[int, ...] | None
    row_index: Tensor
    query_start: Tensor
    token_rows: Tensor
    positions: Tensor
    max_query_len: int = 0


class PackedLayout(NamedTuple):
    """A layout whose tensors are handles into a step's buffer."""

    rows: tuple[int, ...]
    query_lens: tuple[int, ...]
    handles: tuple[slice, ...]

    def on_device(self, packed: Packer) -> StepLayout:
        row_index, query_start, token_rows, positions = (packed[handle] for handle in self.handles)
        return StepLayout(self.rows, self.query_lens, row_index, query_start, token_rows, positions)


def pack_layout(
    rows: Sequence[int], query_lens: Sequence[int], packer: Packer, starts: Sequence[int | None] = ()
) -> PackedLayout:
    """Put the layout's index tensors into the step's buffer. `starts`: first position of each sequence; None, or none
    at all: that of its row's last token."""
    lens = np.asarray(query_lens, dtype=np.int64)
    start = np.concatenate(([0], np.cumsum(lens)))
    sequence = np.repeat(np.arange(len(lens)), lens)
    offset = np.arange(start[-1]) - start[sequence]
    index = np.asarray(rows, dtype=np.int64)
    first = np.asarray([-1 if at is None else at for at in starts or [None] * len(lens)], dtype=np.int64)[sequence]
    positions = np.where(first < 0, -1 - offset, first + offset)
    handles = tuple(packer.add(array) for array in (index, start, index[sequence], positions))
    return PackedLayout(tuple(rows), tuple(query_lens), handles)


def uniform_layout(rows: tuple[int, ...], row_index: Tensor, count: int) -> StepLayout:
    """`count` tokens of each row, from its last one on; made on the device."""
    batch, device = len(rows), row_index.device
    tokens = torch.arange(batch * count, device=device)
    sequence = tokens // count
    query_start = torch.arange(batch + 1, device=device) * count
    token_rows = row_index if count == 1 else row_index[sequence]
    return StepLayout(rows, (count,) * batch, row_index, query_start, token_rows, sequence * count - tokens - 1)


def sample_index(plan_rows: Sequence[PlanRow]) -> list[int] | None:
    """Token indices [S * (K+1)] whose logits the S sampling rows need; None if that is every token in order.

    A row's last 1+k tokens are wanted; rows with fewer drafts than the maximum K repeat their last one.
    """
    width = max((row.num_drafts for row in plan_rows if row.samples), default=0)
    index: list[int] = []
    end = 0
    for row in plan_rows:
        end += row.num_new + row.num_drafts
        if row.samples:
            first = end - 1 - row.num_drafts
            index += [min(first + j, end - 1) for j in range(width + 1)]
    return None if index == list(range(end)) else index
