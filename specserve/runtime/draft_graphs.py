"""The draft's passes as CUDA graphs: one for each bucket of rows, from positions to the hidden states that logits want.

A round of k drafts replays the first pass, which reads two tokens of each row, and k - 1 of the others, which read one.
What stands between two replays (logits, drawing, writing the token down) the host launches while the device is busy
with the pass before; nothing is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specserve.device import Graph
from specserve.runtime.capture import Key, kinds
from specserve.runtime.layout import StepLayout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork

MAX_ROWS = 128
"""With more rows a step is bound by arithmetic, and drafting seldom pays."""
_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96)


class DraftGraphs:
    """Passes over `count` tokens a row. Once captured, `run` where there is room for the rows (`most`).

    `max_rows` of a step; `max_context`: no row's KV is ever longer. Rows beyond a batch's own are the padding row.
    """

    def __init__(self, draft: ModelState, rows: DeviceRows, *, count: int, max_rows: int, max_context: int) -> None:
        self._draft = draft
        self._rows = rows
        self._count = count
        self._max_context = max_context
        self.most = min(max_rows, MAX_ROWS)
        self._sizes = [size for size in _BUCKETS if size < self.most] + [self.most]
        self._bucket_of = [next(size for size in self._sizes if size >= used) for used in range(self.most + 1)]
        self.graphs: dict[Key, Graph] = {}
        spec, like = draft.model.spec, rows.num_tokens
        self._row_index = like.new_full((self.most,), rows.padding_row)
        self._token_rows = like.new_full((self.most, count), rows.padding_row)
        self._positions = like.new_zeros(self.most, count)
        self._query_start = torch.arange(0, (self.most + 1) * count, count, device=like.device)
        self._hidden = torch.zeros(self.most, spec.hidden_size, dtype=spec.dtype, device=like.device)
        self._current: tuple[int, ...] = ()  # the rows that the inputs hold

    def works(self, *, with_adapters: bool) -> dict[Key, Callable[[], Tensor]]:
        """What each graph does."""
        return {
            (size, kind): partial(self.forward, size, kind)
            for size in self._sizes[::-1]
            for kind in kinds(size, with_adapters=with_adapters)
            if kind is not AdapterWork.MANY  # a draft's adapters are small; graphs cost time at the start
        }

    def forward(self, size: int, work: AdapterWork) -> Tensor:
        """What a graph replays: the hidden states [size, hidden] of each row's last token, in memory that all share."""
        count = self._count
        layout = StepLayout(
            (), (count,) * size, self._row_index[:size], self._query_start[: size + 1],
            self._token_rows[:size].view(-1), self._positions[:size].view(-1),
        )  # fmt: skip
        hidden = self._draft.forward(self._rows, layout, None, (self._max_context,) * size, work=work)
        return self._hidden[:size].copy_(hidden[count - 1 :: count])

    def run(self, rows: tuple[int, ...], row_index: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [B, hidden] of the last of `positions` [B, count] of each row; they hold until the next run."""
        used = len(rows)
        size = self._bucket_of[used]
        if rows != self._current:
            self._take(rows, row_index)
        self._positions[:used].copy_(positions)
        kind = self._draft.adapters.work([self._rows.adapters[row] for row in rows], (self._count,) * used)
        graph = self.graphs.get((size, kind)) or self.graphs[size, AdapterWork.SOME]
        return graph.replay()[:used]

    def _take(self, rows: tuple[int, ...], row_index: Tensor) -> None:
        """The inputs get other rows. Padding reads position 0: a far one would read as many keys."""
        used, before = len(rows), len(self._current)
        self._row_index[:used].copy_(row_index)
        self._token_rows[:used].copy_(row_index.unsqueeze(1).expand(used, self._count))
        if used < before:
            self._row_index[used:before].fill_(self._rows.padding_row)
            self._token_rows[used:before].fill_(self._rows.padding_row)
            self._positions[used:before].zero_()
        self._current = rows
