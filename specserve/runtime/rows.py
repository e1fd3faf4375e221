"""DeviceRows: everything about running requests that the device must know, one persistent row each.

The device's lengths are the truth; the scheduler's are upper bounds while steps are in flight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.core.plan import BlockAppend, NewRow
from specserve.sampling.rows import SamplingRows


class DeviceRows:
    """`max_num_seqs` rows. History and block table are wider than any request by `slack` tokens: rows that overrun
    their last token for a step read and write there, and a block table entry that was never set is block 0."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        *,
        slack: int,
        block_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        width = max_model_len + slack

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.history = zeros(max_num_seqs, width)  # [R, width] committed tokens, then scratch
        self.block_tables = zeros(max_num_seqs, -(-width // block_size))  # [R, max_blocks]
        self.num_tokens = zeros(max_num_seqs)  # [R] committed
        self.prompt_lens = zeros(max_num_seqs)  # [R]
        self.num_draft_computed = zeros(max_num_seqs)  # [R] tokens whose draft KV is right
        self.sampling = SamplingRows(max_num_seqs, vocab_size, device, dtype)
        # On the host: (slot, weight) pairs, and how many top logprobs each row wants (None: no logprobs).
        self.adapters: list[tuple[tuple[int, float], ...]] = [()] * max_num_seqs
        self.num_logprobs: list[int | None] = [None] * max_num_seqs

    def take(self, new: NewRow) -> None:
        """A request moves into a row: nothing of the row's former tenant remains."""
        count = len(new.token_ids)
        self.history[new.row, :count] = torch.tensor(new.token_ids, device=self.history.device)
        self.block_tables[new.row].zero_()
        self.num_tokens[new.row] = count
        self.prompt_lens[new.row] = new.prompt_len
        self.num_draft_computed[new.row] = new.num_draft_computed
        self.sampling.set_row(new.row, new.params, new.seed, new.stop_ids, new.prompt_len)
        self.adapters[new.row] = new.adapters
        self.num_logprobs[new.row] = new.params.logprobs

    def append_blocks(self, change: BlockAppend) -> None:
        end = change.start + len(change.block_ids)
        blocks = torch.tensor(change.block_ids, device=self.block_tables.device)
        self.block_tables[change.row, change.start : end] = blocks

    def commit(self, rows: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Append tokens[i, :counts[i]] to row rows[i]; tokens [B, K+1]. What lies beyond the count is scratch."""
        lengths = self.num_tokens[rows]  # [B]
        columns = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)  # [B, K+1]
        self.history[rows.unsqueeze(1), columns] = tokens
        self.num_tokens[rows] = lengths + counts
