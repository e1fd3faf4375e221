"""Drafts for one step: catch the draft model up, ask each proposer for its rows, put the answers side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.core.plan import PlanRow
from specserve.runtime.layout import index_tensor, step_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve.speculation.registry import ProposerRegistry


@dataclass(frozen=True, slots=True)
class Drafter:
    """The draft side of a ModelRunner. `draft` is None without a draft model."""

    proposers: ProposerRegistry
    rows: DeviceRows
    draft: ModelState | None
    device: torch.device

    def catch_up(self, plan_rows: list[PlanRow]) -> None:
        """Draft prefill: compute the draft's KV over the next `draft_prefill` tokens of each row that asks for it."""
        behind = [row for row in plan_rows if row.draft_prefill]
        if not behind or self.draft is None:
            return
        row_list = tuple(row.row for row in behind)
        row_index = index_tensor(row_list, self.device)
        counts = tuple(row.draft_prefill for row in behind)
        layout = step_layout(counts, self.device)
        start = self.rows.num_draft_computed[row_index]  # [B]
        positions = start[layout.sequence] + layout.offset
        bounds = tuple(row.context_bound for row in behind)
        self.draft.forward(self.rows, row_list, row_index, layout, positions, bounds)
        self.rows.num_draft_computed[row_index] = start + index_tensor(counts, self.device)

    def propose(self, plan_rows: list[PlanRow], vocab_size: int) -> Drafts | None:
        """Drafts of all sampling rows in order (count 0 where a row has none); None if no row drafts."""
        drafting = [index for index, row in enumerate(plan_rows) if row.num_drafts]
        if not drafting:
            return None
        parts = []
        for name in sorted({plan_rows[index].proposer or "" for index in drafting}):
            indices = [index for index in drafting if plan_rows[index].proposer == name]
            batch = self._batch([plan_rows[index] for index in indices])
            parts.append((indices, self.proposers.get(name).propose(batch)))
        if len(parts) == 1 and len(drafting) == len(plan_rows):
            return parts[0][1]
        return merge_drafts(parts, len(plan_rows), vocab_size)

    def _batch(self, plan_rows: list[PlanRow]) -> DraftBatch:
        row_list = tuple(row.row for row in plan_rows)
        row_index = index_tensor(row_list, self.device)
        return DraftBatch(
            rows=row_index,
            num_drafts=tuple(row.num_drafts for row in plan_rows),
            history=self.rows.history,
            lengths=self.rows.num_tokens,
            num_tokens=self.rows.num_tokens[row_index],
            sampling=self.rows.sampling.gather(row_list),
            forward=self._forward_fn(row_list, row_index, tuple(row.context_bound for row in plan_rows)),
        )

    def _forward_fn(
        self, row_list: tuple[int, ...], row_index: Tensor, bounds: tuple[int, ...]
    ) -> Callable[[Tensor], Tensor] | None:
        draft = self.draft
        if draft is None:
            return None

        def forward(positions: Tensor) -> Tensor:
            batch, count = positions.shape
            layout = step_layout((count,) * batch, self.device)
            hidden = draft.forward(self.rows, row_list, row_index, layout, positions.reshape(-1), bounds)
            return draft.model.compute_logits(hidden[count - 1 :: count])  # [B, vocab]

        return forward


def merge_drafts(parts: list[tuple[list[int], Drafts]], num_rows: int, vocab_size: int) -> Drafts:
    """Drafts of several proposers, each for the rows `indices`, in one batch of `num_rows`; the rest gets count 0.

    A proposer without probs is one-hot where another brings them.
    """
    device = parts[0][1].tokens.device
    width = max(drafts.tokens.shape[1] for _, drafts in parts)
    tokens = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    counts = torch.zeros(num_rows, dtype=torch.int64, device=device)
    dtypes = [drafts.probs.dtype for _, drafts in parts if drafts.probs is not None]
    probs = torch.zeros(num_rows, width, vocab_size, dtype=dtypes[0], device=device) if dtypes else None
    for indices, drafts in parts:
        where = torch.tensor(indices, device=device)
        depth = drafts.tokens.shape[1]
        tokens[where, :depth] = drafts.tokens
        counts[where] = drafts.counts
        if probs is not None:
            one_hot = torch.nn.functional.one_hot(drafts.tokens, vocab_size).to(probs.dtype)
            probs[where, :depth] = one_hot if drafts.probs is None else drafts.probs
    return Drafts(tokens, counts, probs)
