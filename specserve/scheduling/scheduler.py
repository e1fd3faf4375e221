"""Scheduler: which tokens of which requests run in the next step, and what a step's result means for them.

One rule: a request has tokens that are known (or drafted) and tokens whose KV is computed, and a step hands out the
difference under one token budget. A decode is 1 token, a verification 1+k, a prefill chunk n.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from specserve.core.errors import AdapterError
from specserve.core.messages import ErrorInfo, RequestOutput
from specserve.core.plan import StepPlan, StepResult
from specserve.scheduling.adapter_slots import AdapterSlots
from specserve.scheduling.commit import Committer
from specserve.scheduling.cost_table import CostTable
from specserve.scheduling.draft_policy import DraftPolicy
from specserve.scheduling.drafts import choose_drafts
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.prefix_cache import root_hash
from specserve.scheduling.request import Request, Status
from specserve.scheduling.step_draft import InFlightRow, StepDraft, new_row
from specserve.scheduling.waiting import WaitingLine


class Scheduler:
    """Owns waiting and running requests. `draft_kv[name]`: whether that proposer keeps KV of its own; `costs`: what
    steps take; without it, requests that name no number of drafts get none."""

    def __init__(
        self,
        kv: KVCacheManager,
        adapters: AdapterSlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        draft_kv: Mapping[str, bool],
        costs: CostTable | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv = kv
        self.adapters = adapters
        self.max_num_batched_tokens = max_num_batched_tokens
        self.draft_kv = draft_kv
        self.policy = DraftPolicy(draft_kv, costs)
        self.clock = clock
        self.waiting = WaitingLine(adapters, max_num_seqs, self._fail)
        self.running: list[Request] = []  # in order of admission
        self.requests: dict[str, Request] = {}
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.in_flight: deque[list[InFlightRow]] = deque()
        self._committer = Committer(kv, adapters, self.waiting, self.policy, draft_kv)
        self.stats = self._committer.stats
        self._failed: list[RequestOutput] = []

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; it takes its references on adapters now. Raises NotFoundError for an unknown adapter."""
        request.adapter_uses = self.adapters.acquire(request.lora)
        request.queued_at = self.clock()
        self.requests[request.request_id] = request
        self.waiting.add(request)

    def abort(self, request_id: str) -> None:
        """End a request at any moment, silently; an unknown id is one that has just finished."""
        request = self.requests.get(request_id)
        if request is not None:
            self._finish(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.in_flight or self._failed)

    # --- schedule ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next step's plan; empty when nothing can run now."""
        decodes = [request for request in self.running if not request.prefilling]
        spare = self._spare_tokens(len(decodes))
        coming = len(self.running) - len(decodes) + min(len(self.waiting), len(self.free_rows))
        choice = self.policy.choose(decodes, spare, coming)
        draft = StepDraft(budget=self.max_num_batched_tokens, spare=spare, choice=choice)
        for request in list(self.running):
            if request.status is Status.RUNNING:
                self._plan_prefill(request, draft) if request.prefilling else self._plan_decode(request, draft)
        self._admit_waiting(draft)
        draft.arrange()
        if draft.rows or draft.loads:
            self.in_flight.append(draft.rows)
            self.policy.planned(draft.shape())
            self.stats.steps += 1
        return draft.plan(self.stats.steps)

    def _spare_tokens(self, decodes: int) -> int:
        """What drafting may take: each decode row keeps its token, and a prompt that could run now half of the rest."""
        rest = max(0, self.max_num_batched_tokens - decodes)
        prefilling = decodes < len(self.running)
        return rest // 2 if prefilling or (self.waiting and self.free_rows) else rest

    def _plan_decode(self, request: Request, draft: StepDraft) -> None:
        if request.tokens_left <= 0 or draft.budget < 1:
            return
        draft_kv = request.proposer is not None and self.draft_kv[request.proposer]
        drafts, catch_up = choose_drafts(request, draft.spare, auto=draft.choice.drafts(request), draft_kv=draft_kv)
        known = request.num_tokens + request.in_flight_bound
        if not self.kv.can_grow(request, min(known + drafts, request.max_total)):
            drafts = 0  # nobody loses blocks to a guess
        bound = min(known + drafts, request.max_total)
        if not self._grow(request, bound, draft):
            return
        draft.decode(request, drafts, catch_up, bound)

    def _plan_prefill(self, request: Request, draft: StepDraft) -> None:
        start = request.num_computed_tokens
        count = min(request.prefill_end - start, draft.budget)
        if count < 1 or not self._grow(request, start + count, draft):
            return
        draft.prefill(request, count)
        if request.epoch == 0:  # what preemption makes us compute again is not its flow's fault
            self.waiting.charge(request, count)

    def _grow(self, request: Request, num_tokens: int, draft: StepDraft) -> bool:
        """Blocks for `num_tokens`, preempting the youngest requests for them; False if it was itself preempted."""
        start = len(request.block_ids)
        while self.kv.grow(request, num_tokens) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        draft.append_blocks(request, start)
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; its tokens and slots stay, its KV is recomputed. Steps in flight still bring
        tokens.

        Its blocks may be handed out at once: the device runs steps in order, so the step in flight is done with them.
        """
        self._leave_row(request)
        request.epoch += 1
        request.status = Status.WAITING
        self.running.remove(request)
        self.waiting.put_back(request)
        self.stats.preemptions += 1

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Let adapters come nearer, then give free rows to those who are next and have all else that they need."""
        self.waiting.advance(len(self.free_rows), draft.loads)
        while draft.budget >= 1 and self.free_rows:
            request = self.waiting.next()
            if request is None:
                return
            request.root = root_hash(self.adapters.cache_key(request.adapter_uses), request.cache_salt)
            if not self.kv.admit(request):
                self.waiting.hold_back(request)
                return
            self.waiting.take(request)
            self._enter_row(request, draft)
            self._plan_prefill(request, draft)

    def _fail(self, request: Request, error: AdapterError) -> None:
        """Its adapters cannot be read."""
        output = RequestOutput(request_id=request.request_id, finish_reason="error", error=ErrorInfo.of(error))
        self._failed.append(output)
        self._finish(request)

    def _enter_row(self, request: Request, draft: StepDraft) -> None:
        self.running.append(request)
        request.status = Status.RUNNING
        request.row = self.free_rows.pop()
        request.prefill_end = request.num_tokens
        if request.epoch == 0:
            request.queue_seconds = self.clock() - request.queued_at
            request.cached_tokens = min(request.num_computed_tokens, request.prompt_len)
            self.stats.prompt_tokens += request.prompt_len
            self.policy.enter(request, self.adapters.cache_key(request.adapter_uses))
        draft.enter(new_row(request))
        draft.append_blocks(request, 0)

    # --- commit -----------------------------------------------------------------------------------------------------

    def commit(self, result: StepResult, milliseconds: float | None = None) -> list[RequestOutput]:
        """Take the oldest step's result: append tokens, end requests, offer full blocks to the prefix cache.
        `milliseconds`: from the step before to this one, where nothing but steps came between."""
        outputs = self.take_failed()
        self.policy.took(milliseconds)
        for entry, row_result in zip(self.in_flight.popleft(), result.rows, strict=True):
            request, output = entry.request, self._committer.commit(entry, row_result)
            if request.status is Status.FINISHED:
                if request.num_in_flight == 0 and request.row is not None:
                    self._retire(request)
            elif output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    self._finish(request)
        return outputs

    def take_failed(self) -> list[RequestOutput]:
        """Outputs of requests that ended without a step, because their adapter could not be read."""
        failed, self._failed = self._failed, []
        return failed

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        if request.status is Status.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
        request.status = Status.FINISHED
        del self.requests[request.request_id]
        if request.row is None or request.num_in_flight == 0:
            self._retire(request)

    def _retire(self, request: Request) -> None:
        """The end of a finished request, once no step in flight writes to its blocks or reads its adapters."""
        if request.row is not None:
            self._leave_row(request)
        if request.slots is not None:
            self.adapters.release_slots(request.adapter_uses)
        self.adapters.release(request.adapter_uses)
        self.waiting.forget(request)

    def _leave_row(self, request: Request) -> None:
        assert request.row is not None
        self.kv.release(request)
        self.free_rows.append(request.row)
        request.row = None

    def check_integrity(self) -> None:
        """Assert that rows and blocks belong to exactly one owner and none leaked."""
        holders = {id(r): r for r in self.running}
        holders |= {id(e.request): e.request for step in self.in_flight for e in step if e.request.row is not None}
        rows = [r.row for r in holders.values()]
        assert len(set(rows)) == len(rows), "two requests share a row"
        assert None not in rows, "a running request lacks a row"
        total = len(rows) + len(self.free_rows)
        assert len(set(self.free_rows) | set(rows)) == total, "rows leaked or doubled"
        self.kv.pool.check_integrity([r.block_ids for r in holders.values()])
        assert set(self.requests.values()) == set(self.waiting) | set(self.running), "requests leaked"
        self.waiting.check_integrity()
        self.waiting.flows.check_integrity(len(set(self.waiting)) + len(holders))
