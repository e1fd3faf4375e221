"""ModelRunner: carries out StepPlans on the device and reports StepResults. It never changes a Request.

On a GPU nothing here waits for the device: a step is queued, its results travel back on their own, and whoever holds
the ticket waits for them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from specserve.core.plan import PlanRow, StepPlan
from specserve.device import upload
from specserve.runtime.drafting import Drafter
from specserve.runtime.graphs import DecodeGraphs
from specserve.runtime.layout import uniform_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve.runtime.step import StepInputs, StepPacker
from specserve.runtime.ticket import AskedLogprobs, EmptyStep, SampledStep, Ticket
from specserve.sampling.logprobs import logprobs
from specserve.sampling.processors import process
from specserve.speculation.proposer import Drafts
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.host_adapter import HostAdapter
from specserve_kernels.commit import commit_tokens
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
        self.graphs: DecodeGraphs | None = None
        self.drafter = Drafter(proposers, rows, draft)
        self._packer = StepPacker(rows, proposers.keeps_kv(), device)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Ticket:
        """Queue a step on the device."""
        self._load_adapters(plan)
        inputs = self._packer.prepare(plan)
        if inputs is None:
            return EmptyStep(plan)
        sampling_rows = [row for row in plan.rows if row.samples]
        if inputs.catch_up is not None:
            self.drafter.catch_up(inputs.catch_up, tuple(r.context_bound for r in plan.rows if r.draft_prefill))
        vocab_size = self.target.model.spec.vocab_size
        drafts = self.drafter.propose(inputs.draft_groups, len(sampling_rows), vocab_size)
        if drafts is not None:
            self._note_drafts(inputs.sampling_rows, drafts)
        logits = self._forward(plan.rows, inputs)  # [S, K+1, vocab] | None
        if logits is None:
            return EmptyStep(plan)
        verified = self._verify(sampling_rows, inputs.sampling_rows, logits, drafts)
        committed = self._commit(inputs, verified)
        drafted = None if drafts is None else drafts.counts
        return SampledStep(plan, committed, drafted, self._logprobs(sampling_rows, logits, verified.tokens))

    @torch.inference_mode()
    def probe(self) -> None:
        """A verification's forward that changes nothing: row 0, which has no request yet, writes to block 0."""
        self.forward_rows((0,), PROBE_TOKENS, PROBE_TOKENS)

    @torch.inference_mode()
    def forward_rows(self, rows: tuple[int, ...], count: int, context_bound: int) -> Tensor:
        """Logits [B, vocab] of the last of `count` tokens from position 0 on of each of `rows`; for measuring."""
        layout = uniform_layout(rows, upload(np.asarray(rows, dtype=np.int64), self.device), count)
        hidden = self.target.forward(self.rows, layout, layout.offset, (context_bound,) * len(rows))
        return self.target.model.compute_logits(hidden[count - 1 :: count])

    def _load_adapters(self, plan: StepPlan) -> None:
        for load in plan.adapter_loads:
            target, companion = self.host_adapters(load.version)
            self.target.adapters.load_slot(load.slot, target)
            if self.draft is not None:
                self.draft.adapters.load_slot(load.slot, companion)

    def _note_drafts(self, row_index: Tensor, drafts: Drafts) -> None:
        """Put drafts behind the rows' committed tokens, where the target's forward reads its input."""
        steps = torch.arange(drafts.tokens.shape[1], device=self.device)
        columns = self.rows.num_tokens[row_index].unsqueeze(1) + steps  # [S, K]
        self.rows.history[row_index.unsqueeze(1), columns] = drafts.tokens

    def _forward(self, plan_rows: list[PlanRow], inputs: StepInputs) -> Tensor | None:
        """Logits [S, K+1, vocab] of the S sampling rows, each row's last 1+k tokens first; None if no row samples."""
        layout = inputs.layout
        if self.graphs is not None and self.graphs.can_run(plan_rows):
            return self.graphs.run(layout).unsqueeze(1)
        bounds = tuple(row.context_bound for row in plan_rows)
        positions = self._starts(inputs)[layout.sequence] + layout.offset
        hidden = self.target.forward(self.rows, layout, positions, bounds)
        num_sampling = inputs.sampling_rows.shape[0]
        if not num_sampling:
            return None
        wanted = hidden if inputs.sample_index is None else hidden[inputs.sample_index]
        logits: Tensor = self.target.model.compute_logits(wanted)
        return logits.view(num_sampling, -1, logits.shape[-1])

    def _starts(self, inputs: StepInputs) -> Tensor:
        """First position of each row [B]: a prefill chunk's is the plan's, a decode row's is its last token's."""
        last = self.rows.num_tokens[inputs.layout.row_index] - 1
        chunks = inputs.starts.shape[0]
        return last if not chunks else torch.cat((last[:-chunks], inputs.starts))

    def _verify(self, rows: list[PlanRow], row_index: Tensor, logits: Tensor, drafts: Drafts | None) -> Verified:
        num_tokens = self.rows.num_tokens[row_index]  # [S]
        if drafts is None:
            drafts = Drafts(num_tokens.new_zeros(len(rows), 0), torch.zeros_like(num_tokens))
        sampling = self.rows.sampling.gather(tuple(row.row for row in rows))
        sampling = sampling.with_history(self.rows.num_tokens, self.rows.history)
        processed = process(logits, sampling, drafts.tokens)
        return verify(
            processed, drafts.tokens, drafts.counts, drafts.probs, sampling.seed, num_tokens, sampling.temperature,
            sampling.is_coupled, any_coupled=sampling.any_coupled, any_rejection=sampling.any_rejection,
        )  # fmt: skip

    def _commit(self, inputs: StepInputs, verified: Verified) -> Tensor:
        """Counts and tokens [S, K+2], now behind the rows' history."""
        rows, row_index = self.rows, inputs.sampling_rows
        if inputs.draft_limits is not None:
            # After k passes the draft's KV is right for the old tokens and all accepted drafts but the k-th.
            limit = inputs.draft_limits
            right = rows.num_tokens[row_index] + torch.minimum(verified.num_accepted, limit - 1)
            before = rows.num_draft_computed[row_index]
            rows.num_draft_computed.index_copy_(0, row_index, torch.where(limit > 0, right, before))
        return commit_tokens(rows.history, rows.num_tokens, row_index, verified.tokens, verified.num_tokens)

    def _logprobs(self, rows: list[PlanRow], logits: Tensor, tokens: Tensor) -> AskedLogprobs | None:
        wanted = [self.rows.num_logprobs[row.row] for row in rows]
        asking = [index for index, top in enumerate(wanted) if top is not None]
        if not asking:
            return None
        top = [count for count in wanted if count is not None]
        index = upload(np.asarray(asking, dtype=np.int64), self.device)
        return AskedLogprobs(asking, top, logprobs(logits[index], tokens[index], max(top)))
