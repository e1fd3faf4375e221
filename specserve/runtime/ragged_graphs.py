"""The target's forward as CUDA graphs of ragged batches: any mix of decodes, verifications and prefill chunks.

One graph for each bucket of tokens, from index tensors to hidden states. How the tokens are shared out among sequences
is written in `query_start` on the device, so one graph takes every mix of as many tokens: the attention kernels find
there which sequences are theirs. Logits are launched behind the replay, of the tokens that want them, while the device
is busy with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from specserve.device import Graph
from specserve.runtime.capture import Key, kinds
from specserve.runtime.layout import StepLayout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork
from specserve_kernels.lora.tiles import LARGEST_TILE

MAX_TOKENS = 1024
"""Beyond so many tokens a step's launches hide behind its work."""
_SMALL_BUCKETS = (16, 32, 48)
_BUCKET_STEP = 64


def verification_buckets(max_tokens: int) -> list[int]:
    """Of steps that decode and verify: multiples of 8 up to 64, beyond quarters of the power of two below."""
    quarters = (range(base + base // 4, 2 * base + 1, base // 4) for base in (64, 128, 256, 512))
    sizes = [*range(8, 65, 8), *chain.from_iterable(quarters)]
    last = min(max_tokens, MAX_TOKENS)
    return [size for size in sizes if size < last] + [last]


def token_buckets(max_tokens: int) -> list[int]:
    """Numbers of tokens that graphs are captured for: 16, 32, 48, then every multiple of 64 up to `max_tokens`, which
    is the last, or MAX_TOKENS."""
    last = min(max_tokens, MAX_TOKENS)
    sizes = (*_SMALL_BUCKETS, *range(_BUCKET_STEP, last, _BUCKET_STEP))
    return [size for size in sizes if size < last] + [last]


class RaggedGraphs:
    """Once captured, `run` wherever `can_run` says so.

    `sizes`: buckets of tokens, ascending; `max_rows`, of which no step has more; `max_context`: no row's KV is ever
    longer; `max_query_len`: no row has more tokens in a step (None: any number).

    Tokens beyond a step's own are the padding row's first one, of no sequence; sequences beyond its own are empty.
    """

    def __init__(
        self, target: ModelState, rows: DeviceRows, sizes: Sequence[int], *, max_rows: int, max_context: int,
        max_query_len: int | None = None,
    ) -> None:  # fmt: skip
        self._target = target
        self._rows = rows
        self.sizes = list(sizes)
        self._max_rows = max_rows
        self._max_context = max_context
        self._max_query_len = max_query_len or self.sizes[-1]
        self.graphs: dict[Key, Graph] = {}
        spec, most, like = target.model.spec, self.sizes[-1], rows.num_tokens
        self._inputs = like.new_zeros(2 * most + 2 * max_rows + 1)  # of the next replay, whichever bucket's
        self._hidden = like.new_zeros(most, spec.hidden_size, dtype=spec.dtype)  # of the last replay
        self._padding_row = like.new_full((max(most, max_rows),), rows.padding_row)
        self._zeros = torch.zeros_like(self._padding_row)
        self._current: StepLayout | None = None  # what the inputs hold

    def works(self, *, with_adapters: bool) -> dict[Key, Callable[[], Tensor]]:
        """What each graph does. Until the first `run` the inputs are tokens of blank rows, of no sequence."""
        mixes = self._target.adapters_behind and self._max_query_len >= LARGEST_TILE
        return {
            (size, kind): partial(self.forward, size, kind)
            for size in self.sizes[::-1]
            for kind in kinds(size, with_adapters=with_adapters, mixes=mixes)
        }

    def forward(self, size: int, work: AdapterWork) -> Tensor:
        """What a graph replays: hidden states [size, hidden] of the inputs, in memory that all graphs share."""
        layout = self._layout(size)
        bounds = (self._max_context,) * layout.row_index.shape[0]
        hidden = self._target.forward(self._rows, layout, None, bounds, work=work)
        return self._hidden[:size].copy_(hidden)

    def can_run(self, query_lens: Sequence[int]) -> bool:
        """Whether a graph has room for so many tokens of each sequence."""
        fits = 0 < sum(query_lens) <= self.sizes[-1] and len(query_lens) <= self._max_rows
        return fits and max(query_lens) <= self._max_query_len

    def run(self, layout: StepLayout) -> Tensor:
        """Hidden states [T, hidden] of the layout's tokens; they hold until the next run."""
        count = layout.token_rows.shape[0]
        size = self.sizes[bisect_left(self.sizes, count)]
        if layout is not self._current:  # steady verifications repeat theirs
            self._fill(layout, size)
            self._current = layout
        kind = self._target.adapter_work(self._rows, layout, size)
        graph = self.graphs.get((size, kind)) or self.graphs[size, AdapterWork.SOME]
        return graph.replay()[:count]

    def _layout(self, size: int) -> StepLayout:
        """Where a bucket's graphs read their inputs."""
        batch = min(size, self._max_rows)
        parts = self._inputs[: 2 * size + 2 * batch + 1].split_with_sizes((size, size, batch, batch + 1))
        token_rows, positions, row_index, query_start = parts
        most = min(size, self._max_query_len)
        return StepLayout((), None, row_index, query_start, token_rows, positions, most)

    def _fill(self, layout: StepLayout, size: int) -> None:
        """Write the layout to the inputs, padded, in one launch."""
        batch = min(size, self._max_rows)
        tokens, rows = size - layout.token_rows.shape[0], batch - layout.row_index.shape[0]
        padded = (
            layout.token_rows, self._padding_row[:tokens],
            layout.positions, self._zeros[:tokens],
            layout.row_index, self._padding_row[:rows],
            layout.query_start, layout.query_start[-1:].expand(rows),
        )  # fmt: skip
        torch.cat(padded, out=self._inputs[: 2 * size + 2 * batch + 1])
