"""DeviceRows: everything about running requests that the device must know, one persistent row each.

The device's lengths are the truth; the scheduler's are upper bounds while steps are in flight. All integers of all
rows lie in one flat memory, so that whatever a plan changes (new requests, new blocks) is one copy and one scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from specserve.core.plan import BlockAppend, NewRow
from specserve.runtime.packing import Ints, Packer
from specserve.sampling.rows import SamplingRows


class Changes(NamedTuple):
    """Handles of a step's changes in its packed buffer: where in the flat memory, and what."""

    places: slice
    values: slice
    new_rows: slice
    weights: slice


class DeviceRows:
    """`max_num_seqs` rows and one more, the padding row: a request of one token in block 0, without adapters.

    History and block table are wider than any request by `slack` tokens: rows that overrun their last token for a
    step read and write there, and a block table entry that was never set is block 0.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        *,
        slack: int,
        block_size: int,
        vocab_size: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        count, width = max_num_seqs + 1, max_model_len + slack
        blocks = -(-width // block_size)
        sizes = (count * width, count * blocks, count, count, count * max_adapters)
        self._words = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        history, tables, num_tokens, draft_computed, slots = self._words.split_with_sizes(sizes)
        self._starts = dict(zip(_FIELDS, np.cumsum((0, *sizes)).tolist(), strict=False))
        self.history = history.view(count, width)  # [R, width] committed tokens, then scratch
        self.block_tables = tables.view(count, blocks)  # [R, max_blocks]
        self.num_tokens = num_tokens  # [R] committed
        self.num_draft_computed = draft_computed  # [R] tokens whose draft KV is right
        self.adapter_slots = slots.view(count, max_adapters)  # [R, max_adapters], −1: none
        self.adapter_weights = torch.zeros(count, max_adapters, dtype=torch.float32, device=device)
        self.sampling = SamplingRows(max_num_seqs, vocab_size, device, dtype)
        self.padding_row = max_num_seqs
        self.num_tokens[self.padding_row] = 1
        self.adapter_slots.fill_(-1)
        # On the host: (slot, weight) pairs, how many top logprobs each row wants (None: no logprobs), block tables.
        self.adapters: list[tuple[tuple[int, float], ...]] = [()] * count
        self.num_logprobs: list[int | None] = [None] * count
        self._tables = np.zeros((count, blocks), dtype=np.int64)
        self._num_blocks = [0] * count  # entries that may not be zero

    # --- a plan's changes -------------------------------------------------------------------------------------------

    def pack(self, new_rows: Sequence[NewRow], blocks: Sequence[BlockAppend], packer: Packer) -> Changes | None:
        """Put the changes into the step's buffer; None if there are none. A new row keeps nothing of its former
        tenant; new rows come before blocks."""
        if not new_rows and not blocks:
            return None
        writes = _Writes()
        dirty: dict[int, tuple[int, int]] = {}  # row → range of its block table
        for new in new_rows:
            self._take(new, writes)
            dirty[new.row] = (0, self._num_blocks[new.row])
            self._tables[new.row, : self._num_blocks[new.row]] = 0
            self._num_blocks[new.row] = 0
        for change in blocks:
            end = change.start + len(change.block_ids)
            self._tables[change.row, change.start : end] = change.block_ids
            self._num_blocks[change.row] = max(self._num_blocks[change.row], end)
            first, last = dirty.get(change.row, (change.start, end))
            dirty[change.row] = (min(first, change.start), max(last, end))
        for row, (first, last) in dirty.items():
            writes.add(self._place("block_tables", row, first), self._tables[row, first:last])
        weights = [pair[1] for new in new_rows for pair in self._padded(new)]
        return Changes(
            packer.add(np.concatenate(writes.places)),
            packer.add(np.concatenate(writes.values)),
            packer.add([new.row for new in new_rows]),
            packer.add(np.asarray(weights, dtype=np.float64).view(np.int64)),
        )

    def _take(self, new: NewRow, writes: _Writes) -> None:
        writes.add(self._place("history", new.row), new.token_ids)
        writes.add(self._place("num_tokens", new.row), [len(new.token_ids)])
        writes.add(self._place("num_draft_computed", new.row), [new.num_draft_computed])
        writes.add(self._place("adapter_slots", new.row), [slot for slot, _ in self._padded(new)])
        self.sampling.set_row(new.row, new.params, new.seed, new.stop_ids, new.prompt_len)
        self.adapters[new.row] = new.adapters
        self.num_logprobs[new.row] = new.params.logprobs

    def _padded(self, new: NewRow) -> list[tuple[int, float]]:
        width = self.adapter_slots.shape[1]
        return [*new.adapters, *[(-1, 0.0)] * (width - len(new.adapters))]

    def _place(self, field: str, row: int, column: int = 0) -> int:
        width = getattr(self, field)[0].numel()
        return int(self._starts[field] + row * width + column)

    def apply(self, changes: Changes, packed: Packer) -> None:
        """Write the changes, once the buffer is on the device."""
        self._words.index_copy_(0, packed[changes.places], packed[changes.values])
        if changes.new_rows.stop > changes.new_rows.start:
            weights = packed[changes.weights].view(torch.float64).to(torch.float32)
            shape = (-1, self.adapter_weights.shape[1])
            self.adapter_weights.index_copy_(0, packed[changes.new_rows], weights.view(shape))


_FIELDS = ("history", "block_tables", "num_tokens", "num_draft_computed", "adapter_slots")


class _Writes:
    """Runs of values for consecutive places of the flat memory."""

    def __init__(self) -> None:
        self.places: list[Ints] = []
        self.values: list[Ints] = []

    def add(self, start: int, values: Sequence[int] | Ints) -> None:
        self.places.append(np.arange(start, start + len(values), dtype=np.int64))
        self.values.append(np.asarray(values, dtype=np.int64))
