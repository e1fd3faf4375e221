"""Drafts for one step: catch the draft model up, ask each proposer for its rows, put the answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specserve.core.plan import PlanRow
from specserve.runtime.layout import StepLayout, uniform_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve.runtime.step import DraftGroup
from specserve.runtime.step_graphs import StepGraphs, run_ragged
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve.speculation.registry import ProposerRegistry


@dataclass(slots=True)
class Drafter:
    """The draft side of a ModelRunner. `draft` is None without a draft model, `graphs` until some are captured."""

    proposers: ProposerRegistry
    rows: DeviceRows
    draft: ModelState | None
    graphs: StepGraphs | None = None

    def catch_up(self, layout: StepLayout, context_bounds: tuple[int, ...]) -> None:
        """Draft prefill: compute the draft's KV over the next tokens of each row that is behind."""
        if self.draft is None:
            return
        computed = self.rows.num_draft_computed
        positions = computed[layout.token_rows] - 1 - layout.positions  # the layout counts -1, -2, … in each row
        prefill = None if self.graphs is None else self.graphs.draft_prefill
        if prefill is None or run_ragged([prefill], replace(layout, positions=positions)) is None:
            self.draft.forward(self.rows, layout, positions, context_bounds)
        counts = layout.query_start[1:] - layout.query_start[:-1]
        computed.index_copy_(0, layout.row_index, computed[layout.row_index] + counts)

    def propose(
        self, groups: tuple[DraftGroup, ...], sampling_rows: Sequence[PlanRow], vocab_size: int
    ) -> Drafts | None:
        """Drafts of all sampling rows (count 0 where a row has none); None if no row drafts."""
        if not groups:
            return None
        parts = [(group.indices, self._propose(group, [sampling_rows[i] for i in group.places])) for group in groups]
        if len(parts) == 1 and len(groups[0].rows) == len(sampling_rows):
            return parts[0][1]
        return merge_drafts(parts, len(sampling_rows), vocab_size)

    def _propose(self, group: DraftGroup, plan_rows: Sequence[PlanRow]) -> Drafts:
        bounds = tuple(row.context_bound for row in plan_rows)
        batch = DraftBatch(
            rows=group.row_index,
            num_drafts=group.num_drafts,
            limits=group.limits,
            history=self.rows.history,
            lengths=self.rows.num_tokens,
            num_tokens=self.rows.num_tokens[group.row_index],
            sampling=self.rows.sampling.gather(group.rows),
            forward=self._forward_fn(group.rows, group.row_index, bounds),
            request_ids=tuple(row.request_id for row in plan_rows),
        )
        return self.proposers.get(group.proposer).propose(batch)

    def _forward_fn(
        self, row_list: tuple[int, ...], row_index: Tensor, bounds: tuple[int, ...]
    ) -> Callable[[Tensor], Tensor] | None:
        draft = self.draft
        if draft is None:
            return None

        passes = {} if self.graphs is None else self.graphs.passes

        def forward(positions: Tensor) -> Tensor:
            count = positions.shape[1]
            graphs = passes.get(count)
            if graphs is not None and len(row_list) <= graphs.most:
                return draft.model.compute_logits(graphs.run(row_list, row_index, positions))
            layout = uniform_layout(row_list, row_index, count)
            hidden = draft.forward(self.rows, layout, positions.reshape(-1), bounds)
            return draft.model.compute_logits(hidden[count - 1 :: count])  # [B, vocab]

        return forward


def merge_drafts(parts: list[tuple[Tensor, Drafts]], num_rows: int, vocab_size: int) -> Drafts:
    """Drafts of several proposers, each for the rows `indices` [G] int64, in one batch of `num_rows`; the rest gets
    count 0.

    A proposer without probs is one-hot where another brings them.
    """
    device = parts[0][1].tokens.device
    width = max(drafts.tokens.shape[1] for _, drafts in parts)
    tokens = torch.zeros(num_rows, width, dtype=torch.int64, device=device)
    counts = torch.zeros(num_rows, dtype=torch.int64, device=device)
    written = [drafts.written_out() for _, drafts in parts]
    dtypes = [one.dtype for one in written if one is not None]
    probs = torch.zeros(num_rows, width, vocab_size, dtype=dtypes[0], device=device) if dtypes else None
    for (where, drafts), one in zip(parts, written, strict=True):
        depth = drafts.tokens.shape[1]
        tokens[where, :depth] = drafts.tokens
        counts[where] = drafts.counts
        if probs is not None:
            one_hot = torch.nn.functional.one_hot(drafts.tokens, vocab_size).to(probs.dtype)
            probs[where, :depth] = one_hot if one is None else one
    return Drafts(tokens, counts, probs)
