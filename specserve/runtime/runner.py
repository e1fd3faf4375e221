"""ModelRunner: carries out StepPlans on the device and reports StepResults. It never changes a Request.

On a GPU nothing here waits for the device: a step is queued, its results travel back on their own, and whoever holds
the ticket waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from specserve.core.plan import AdapterLoad, PlanRow, StepPlan
from specserve.device import upload
from specserve.runtime.adapter_loads import AdapterLoads, HostAdapters
from specserve.runtime.drafting import Drafter
from specserve.runtime.layout import uniform_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.rows import DeviceRows
from specserve.runtime.step import StepInputs, StepPacker
from specserve.runtime.step_graphs import Sizes, StepGraphs, run_ragged
from specserve.runtime.ticket import AskedLogprobs, EmptyStep, SampledStep, Ticket
from specserve.runtime.warm_up import warm_up
from specserve.runtime.warm_up_sampling import Expected, warm_up_sampling
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.logprobs import logprobs
from specserve.sampling.processors import prepare
from specserve.sampling.sample import sample
from specserve.speculation.proposer import Drafts
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.pool import AdapterWork
from specserve_kernels.commit import commit_tokens
from specserve_kernels.sampling.rejection import verify

PRETENDED_SLOTS, PRETENDED_RANK = 8, 16  # of trials with adapters: what steps with adapters are like


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
        self.device = device
        self.graphs: StepGraphs | None = None
        self.graph_facts: dict[str, float] = {}  # how many graphs, and what they cost at start
        self.drafter = Drafter(proposers, rows, draft)
        self._loads = AdapterLoads([state.adapters for state in self.states], host_adapters, device)
        self._packer = StepPacker(rows, proposers.keeps_kv(), device)

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Ticket:
        """Queue a step on the device."""
        self._loads.begin(plan.adapter_loads)
        inputs = self._packer.prepare(plan)
        if inputs is None:
            return EmptyStep(plan)
        sampling_rows = [row for row in plan.rows if row.samples]
        if inputs.catch_up is not None:
            self.drafter.catch_up(inputs.catch_up, tuple(r.context_bound for r in plan.rows if r.draft_prefill))
        drafts = self.drafter.propose(inputs.draft_groups, sampling_rows, self.target.model.spec.vocab_size)
        if drafts is not None:
            self._note_drafts(inputs.sampling_rows, drafts)
        logits = self._forward(plan.rows, inputs)  # [S, K+1, vocab] | None
        if logits is None:
            return EmptyStep(plan)
        sampling = self.rows.sampling.gather(tuple(row.row for row in sampling_rows))
        sampling = sampling.with_history(self.rows.num_tokens, self.rows.history)
        tokens, counts = self._choose(inputs, sampling, logits, drafts)
        committed = commit_tokens(self.rows.history, self.rows.num_tokens, inputs.sampling_rows, tokens, counts)
        drafted = None if drafts is None else drafts.counts
        return SampledStep(plan, committed, drafted, self._logprobs(sampling_rows, logits, tokens))

    def loaded(self) -> list[AdapterLoad]:
        """Adapter loads that ended since the last call. Never waits."""
        return self._loads.ended()

    @property
    def states(self) -> list[ModelState]:
        """Target and, where there is one, draft."""
        return [self.target] if self.draft is None else [self.target, self.draft]

    @torch.inference_mode()
    def trial_step(self, num_rows: int, length: int, *, with_adapters: bool = False) -> None:
        """A step of `num_rows` sequences of `length` tokens that changes nothing, for measuring time and memory: the
        padding row's, into block 0; greedy, with probabilities computed once for the samplers' temporaries.
        `with_adapters`: as if there were some, which takes memory of its own."""
        rows = (self.rows.padding_row,) * num_rows
        layout = uniform_layout(rows, upload(np.asarray(rows, dtype=np.int64), self.device), length)
        positions = -1 - layout.positions  # from 0 on in each sequence
        work = AdapterWork.MANY if with_adapters else AdapterWork.NONE
        hidden = self.target.forward(self.rows, layout, positions, (length,) * num_rows, work=work)
        logits = self.target.model.compute_logits(hidden[length - 1 :: length])
        logits.float().softmax(-1).argmax(-1)

    @torch.inference_mode()
    def trial_graph(self, sizes: Sizes, *, with_adapters: bool) -> None:
        """What the largest of the graphs will do, for measuring memory; nothing where there will be none."""
        largest = StepGraphs(self.target, None, self.rows, sizes, drafts=False).largest()
        if largest is not None:
            largest.forward(largest.sizes[-1], AdapterWork.MANY if with_adapters else AdapterWork.NONE)

    @contextmanager
    def pretended_adapters(self) -> Iterator[int]:
        """For trials: as if the first slots held adapters, here so many. 0 where slots are in use, or ranks do not
        say what a step takes."""
        pools = [state.adapters for state in self.states]
        slots = min(PRETENDED_SLOTS, *(pool.num_slots for pool in pools)) if all(p.can_pretend for p in pools) else 0
        for pool in pools:
            pool.pretend(slots, min(PRETENDED_RANK, pool.max_rank))
        try:
            yield slots
        finally:
            for pool in pools:
                pool.pretend(slots, 0)

    def capture_graphs(self, sizes: Sizes, *, drafts: bool, with_adapters: bool, progress: bool) -> None:
        """Capture graphs of the steps that may come; from then on those steps are replayed. Larger steps are run once,
        and tokens are chosen in every way, so that their kernels are compiled. `drafts`: verifications are to be
        expected."""
        graphs = StepGraphs(self.target, self.draft, self.rows, sizes, drafts=drafts)
        self.graph_facts = graphs.capture(self.device, with_adapters=with_adapters, progress=progress)
        self.graphs = self.drafter.graphs = graphs
        warm_up(
            self.states, self.rows, max_tokens=sizes.max_tokens, max_context=sizes.max_context,
            with_adapters=with_adapters,
        )  # fmt: skip
        if self.device.type != "cpu":  # where kernels are interpreted, if they run at all
            self.warm_up_sampling(sizes.max_tokens if drafts else sizes.max_rows, drafts=drafts)

    def warm_up_sampling(self, positions: int, *, drafts: bool) -> None:
        """Choose tokens in every way, so that the kernels are compiled: for up to `positions` at once."""
        spec, draft_dtype = self.target.model.spec, None if self.draft is None else self.draft.model.spec.dtype
        warm_up_sampling(self.rows, spec.vocab_size, Expected(positions, drafts, spec.dtype, draft_dtype))

    def _note_drafts(self, row_index: Tensor, drafts: Drafts) -> None:
        """Put drafts behind the rows' committed tokens, where the target's forward reads its input."""
        steps = torch.arange(drafts.tokens.shape[1], device=self.device)
        columns = self.rows.num_tokens[row_index].unsqueeze(1) + steps  # [S, K]
        self.rows.history[row_index.unsqueeze(1), columns] = drafts.tokens

    def _forward(self, plan_rows: list[PlanRow], inputs: StepInputs) -> Tensor | None:
        """Logits [S, K+1, vocab] of the S sampling rows, each row's last 1+k tokens first; None if no row samples."""
        layout = inputs.layout
        if self.graphs is not None and self.graphs.decode.can_run(plan_rows):
            return self.graphs.decode.run(layout).unsqueeze(1)
        hidden = None if self.graphs is None else run_ragged(self.graphs.ragged, layout)
        if hidden is None:
            bounds = tuple(row.context_bound for row in plan_rows)
            hidden = self.target.forward(self.rows, layout, None, bounds)
        num_sampling = inputs.sampling_rows.shape[0]
        if not num_sampling:
            return None
        wanted = hidden if inputs.sample_index is None else hidden[inputs.sample_index]
        logits: Tensor = self.target.model.compute_logits(wanted)
        return logits.view(num_sampling, -1, logits.shape[-1])

    def _choose(
        self, inputs: StepInputs, sampling: SamplingBatch, logits: Tensor, drafts: Drafts | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [S, K+1] and how many of each row to commit [S] (None: all). Without drafts a row's own sample is
        what verification would give."""
        num_tokens = self.rows.num_tokens[inputs.sampling_rows]  # [S]
        if drafts is None:
            return sample(logits, sampling, num_tokens), None
        target = prepare(logits, sampling, drafts.tokens)
        verified = verify(
            target.logits, drafts.tokens, drafts.counts, drafts.probs, sampling.seed, num_tokens, sampling.temperature,
            sampling.is_coupled, target.divisor, target.cut,
            any_coupled=sampling.any_coupled, any_rejection=sampling.any_rejection,
        )  # fmt: skip
        if inputs.draft_limits is not None:
            self._note_draft_kv(inputs.sampling_rows, inputs.draft_limits, num_tokens, verified.num_accepted)
        return verified.tokens, verified.num_tokens

    def _note_draft_kv(self, row_index: Tensor, limits: Tensor, num_tokens: Tensor, num_accepted: Tensor) -> None:
        """After k passes the draft's KV is right for the old tokens and all accepted drafts but the k-th."""
        before = self.rows.num_draft_computed[row_index]
        right = num_tokens + torch.minimum(num_accepted, limits - 1)
        self.rows.num_draft_computed.index_copy_(0, row_index, torch.where(limits > 0, right, before))

    def _logprobs(self, rows: list[PlanRow], logits: Tensor, tokens: Tensor) -> AskedLogprobs | None:
        wanted = [self.rows.num_logprobs[row.row] for row in rows]
        asking = [index for index, top in enumerate(wanted) if top is not None]
        if not asking:
            return None
        top = [count for count in wanted if count is not None]
        index = upload(np.asarray(asking, dtype=np.int64), self.device)
        return AskedLogprobs(asking, top, logprobs(logits[index], tokens[index], max(top)))
