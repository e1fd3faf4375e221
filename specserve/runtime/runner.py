"""ModelRunner: carries out a StepPlan on the device and reports a StepResult. It never changes a Request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specserve.core.plan import PlanRow, RowResult, StepPlan, StepResult
from specserve.runtime.drafting import Drafter
from specserve.runtime.layout import index_tensor, sample_index, step_layout
from specserve.runtime.logprobs import token_logprobs
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve.sampling.processors import process
from specserve.speculation.proposer import Drafts
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.host_adapter import HostAdapter
from specserve_kernels.rejection import Verified, verify

HostAdapters = Callable[[str], tuple[HostAdapter, HostAdapter | None]]
"""Adapter version → target LoRA and draft companion in the host tier."""


PROBE_TOKENS = 5


class ModelRunner:
    """One step: apply changes, draft, one forward over prefill chunks, decodes and verifications, verify, commit."""

    def __init__(
        self,
        target: ModelState,
        draft: ModelState | None,
        rows: DeviceRows,
        proposers: ProposerRegistry,
        host_adapters: HostAdapters,
        device: torch.device,
    ) -> None:
        self.target = target
        self.draft = draft
        self.rows = rows
        self.host_adapters = host_adapters
        self.device = device
        self.drafter = Drafter(proposers, rows, draft, device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        self._apply(plan)
        if not plan.rows:
            return StepResult(step_id=plan.step_id, rows=[])
        sampling_rows = [row for row in plan.rows if row.samples]
        self.drafter.catch_up(plan.rows)
        drafts = self.drafter.propose(sampling_rows, self.target.model.spec.vocab_size)
        if drafts is not None:
            self._note_drafts(sampling_rows, drafts)
        logits = self._forward(plan.rows)  # [S, K+1, vocab] | None
        if logits is None:
            return StepResult(step_id=plan.step_id, rows=[RowResult(token_ids=[]) for _ in plan.rows])
        verified = self._verify(sampling_rows, logits, drafts)
        self._commit(sampling_rows, verified)
        return self._result(plan, sampling_rows, logits, drafts, verified)

    @torch.inference_mode()
    def probe(self) -> None:
        """A verification's forward that changes nothing: row 0, which has no request yet, writes to block 0."""
        layout = step_layout((PROBE_TOKENS,), self.device)
        row_index = index_tensor((0,), self.device)
        hidden = self.target.forward(self.rows, (0,), row_index, layout, layout.offset, (PROBE_TOKENS,))
        self.target.model.compute_logits(hidden)

    def _apply(self, plan: StepPlan) -> None:
        for load in plan.adapter_loads:
            target, companion = self.host_adapters(load.version)
            self.target.adapters.load_slot(load.slot, target)
            if self.draft is not None:
                self.draft.adapters.load_slot(load.slot, companion)
        for new in plan.new_rows:
            self.rows.take(new)
        for change in plan.blocks:
            self.rows.append_blocks(change)

    def _note_drafts(self, rows: list[PlanRow], drafts: Drafts) -> None:
        """Put drafts behind the rows' committed tokens, where the target's forward reads its input."""
        row_index = index_tensor(tuple(row.row for row in rows), self.device)
        steps = torch.arange(drafts.tokens.shape[1], device=self.device)
        columns = self.rows.num_tokens[row_index].unsqueeze(1) + steps  # [S, K]
        self.rows.history[row_index.unsqueeze(1), columns] = drafts.tokens

    def _forward(self, plan_rows: list[PlanRow]) -> Tensor | None:
        """Logits [S, K+1, vocab] of the S sampling rows, each row's last 1+k tokens first; None if no row samples."""
        row_list = tuple(row.row for row in plan_rows)
        row_index = index_tensor(row_list, self.device)
        query_lens = tuple(row.num_new + row.num_drafts for row in plan_rows)
        layout = step_layout(query_lens, self.device)
        hidden = self.target.forward(
            self.rows, row_list, row_index, layout,
            self._starts(plan_rows, row_index)[layout.sequence] + layout.offset,
            tuple(row.context_bound for row in plan_rows),
        )  # fmt: skip
        samples = tuple(row.samples for row in plan_rows)
        if not any(samples):
            return None
        wanted = sample_index(query_lens, samples, tuple(row.num_drafts for row in plan_rows), self.device)
        logits: Tensor = self.target.model.compute_logits(hidden if wanted is None else hidden[wanted])
        return logits.view(sum(samples), -1, logits.shape[-1])

    def _starts(self, plan_rows: list[PlanRow], row_index: Tensor) -> Tensor:
        """First position of each row [B]: a prefill chunk's is the plan's, a decode row's is its last token's."""
        decodes = sum(row.start is None for row in plan_rows)
        last = self.rows.num_tokens[row_index] - 1
        if decodes < len(plan_rows):
            last[decodes:] = torch.tensor([row.start for row in plan_rows[decodes:]], device=self.device)
        return last

    def _verify(self, rows: list[PlanRow], logits: Tensor, drafts: Drafts | None) -> Verified:
        row_list = tuple(row.row for row in rows)
        row_index = index_tensor(row_list, self.device)
        num_tokens = self.rows.num_tokens[row_index]  # [S]
        if drafts is None:
            drafts = Drafts(num_tokens.new_zeros(len(rows), 0), torch.zeros_like(num_tokens))
        sampling = self.rows.sampling.gather(row_list).with_history(self.rows.num_tokens, self.rows.history)
        processed = process(logits, sampling, drafts.tokens)
        return verify(
            processed, drafts.tokens, drafts.counts, drafts.probs, sampling.seed, num_tokens, sampling.temperature,
            sampling.is_coupled, any_coupled=sampling.any_coupled, any_rejection=sampling.any_rejection,
        )  # fmt: skip

    def _commit(self, rows: list[PlanRow], verified: Verified) -> None:
        row_index = index_tensor(tuple(row.row for row in rows), self.device)
        if self.draft is not None:
            self._commit_draft(rows, row_index, verified)
        self.rows.commit(row_index, verified.tokens, verified.num_tokens)

    def _commit_draft(self, rows: list[PlanRow], row_index: Tensor, verified: Verified) -> None:
        """After k passes the draft's KV is right for the old tokens and all accepted drafts but the k-th."""
        keeps_kv = self.drafter.proposers.keeps_kv()
        passes = tuple(row.num_drafts if row.proposer and keeps_kv[row.proposer] else 0 for row in rows)
        if not any(passes):
            return
        limit = index_tensor(passes, self.device)
        right = self.rows.num_tokens[row_index] + torch.minimum(verified.num_accepted, limit - 1)
        before = self.rows.num_draft_computed[row_index]
        self.rows.num_draft_computed[row_index] = torch.where(limit > 0, right, before)

    def _result(
        self, plan: StepPlan, rows: list[PlanRow], logits: Tensor, drafts: Drafts | None, verified: Verified
    ) -> StepResult:
        tokens, counts = verified.tokens.tolist(), verified.num_tokens.tolist()
        drafted = drafts.counts.tolist() if drafts is not None else [0] * len(rows)
        wanted = [self.rows.num_logprobs[row.row] for row in rows]
        logprobs = token_logprobs(logits, verified.tokens, wanted)  # per row
        results = {
            id(row): RowResult(
                token_ids=tokens[i][: counts[i]],
                num_drafted=drafted[i],
                num_accepted=counts[i] - 1,
                logprobs=logprobs[i][: counts[i]] if wanted[i] is not None else None,
            )
            for i, row in enumerate(rows)
        }
        empty = RowResult(token_ids=[])
        return StepResult(step_id=plan.step_id, rows=[results.get(id(row), empty) for row in plan.rows])
