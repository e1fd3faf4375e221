"""Scheduler: which tokens of which requests run in the next step, and what a step's result means for them.

One rule: a request has tokens that are known (or drafted) and tokens whose KV is computed, and a step hands out the
difference under one token budget. A decode is 1 token, a verification 1+k, a prefill chunk n.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from specserve.core.errors import AdapterError
from specserve.core.messages import ErrorInfo, LoraRef, RequestOutput
from specserve.core.plan import AdapterLoad, NewRow, PlanRow, RowResult, StepPlan, StepResult
from specserve.scheduling.drafts import auto_drafts, choose_drafts
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.outputs import accept_tokens, record_speculation
from specserve.scheduling.prefix_cache import root_hash
from specserve.scheduling.request import Request, Status
from specserve.scheduling.stats import SchedulerStats
from specserve.scheduling.step_draft import InFlightRow, StepDraft
from specserve_adapters.entry import AdapterUse


class AdapterSlots(Protocol):
    """What the scheduler needs of the AdapterManager."""

    def acquire(self, refs: tuple[LoraRef, ...]) -> tuple[AdapterUse, ...]: ...
    def prepare(self, uses: tuple[AdapterUse, ...]) -> bool: ...
    def take_slots(
        self, uses: tuple[AdapterUse, ...]
    ) -> tuple[tuple[tuple[int, float], ...], list[AdapterLoad]] | None: ...
    def release_slots(self, uses: tuple[AdapterUse, ...]) -> None: ...
    def release(self, uses: tuple[AdapterUse, ...]) -> None: ...
    def cache_key(self, uses: tuple[AdapterUse, ...]) -> list[tuple[str, float]]: ...
    def count_tokens(self, uses: tuple[AdapterUse, ...], tokens: int, drafted: int, accepted: int) -> None: ...


class Scheduler:
    """Owns waiting and running requests. `draft_kv[name]`: whether that proposer keeps KV of its own."""

    def __init__(
        self,
        kv: KVCacheManager,
        adapters: AdapterSlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        draft_kv: Mapping[str, bool],
        cheap_tokens: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kv = kv
        self.adapters = adapters
        self.max_num_batched_tokens = max_num_batched_tokens
        self.draft_kv = draft_kv
        self.cheap_tokens = cheap_tokens
        self.clock = clock
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of admission
        self.requests: dict[str, Request] = {}
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.in_flight: deque[list[InFlightRow]] = deque()
        self.stats = SchedulerStats()
        self._failed: list[RequestOutput] = []

    # --- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request; it takes its references on adapters now. Raises NotFoundError for an unknown adapter."""
        request.adapter_uses = self.adapters.acquire(request.lora)
        request.queued_at = self.clock()
        self.requests[request.request_id] = request
        self.waiting.append(request)

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
        decodes = sum(not request.prefilling for request in self.running)
        draft = StepDraft(
            budget=self.max_num_batched_tokens,
            spare=self._spare_tokens(decodes),
            auto_drafts=auto_drafts(decodes, self.cheap_tokens),
        )
        for request in list(self.running):
            if request.status is Status.RUNNING:
                self._plan_prefill(request, draft) if request.prefilling else self._plan_decode(request, draft)
        self._admit_waiting(draft)
        if draft.rows or draft.loads:
            self.in_flight.append(draft.rows)
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
        drafts, catch_up = choose_drafts(request, draft.spare, auto=draft.auto_drafts, draft_kv=draft_kv)
        known = request.num_tokens + request.in_flight_bound
        if not self.kv.can_grow(request, min(known + drafts, request.max_total)):
            drafts = 0  # nobody loses blocks to a guess
        bound = min(known + drafts, request.max_total)
        if not self._grow(request, bound, draft):
            return
        assert request.row is not None
        row = PlanRow(
            request_id=request.request_id, row=request.row, num_new=1, num_drafts=drafts,
            proposer=request.proposer if drafts or catch_up else None,
            draft_prefill=catch_up, context_bound=bound,
        )  # fmt: skip
        request.num_draft_scheduled_tokens += catch_up
        draft.budget -= 1 + drafts + catch_up
        draft.spare -= drafts + catch_up
        draft.decodes.append(self._submit(request, row))

    def _plan_prefill(self, request: Request, draft: StepDraft) -> None:
        start = request.num_computed_tokens
        count = min(request.prefill_end - start, draft.budget)
        if count < 1 or not self._grow(request, start + count, draft):
            return
        assert request.row is not None
        request.num_computed_tokens += count
        row = PlanRow(
            request_id=request.request_id, row=request.row, num_new=count, start=start,
            samples=not request.prefilling, context_bound=start + count,
        )  # fmt: skip
        draft.budget -= count
        draft.prefills.append(self._submit(request, row))

    def _submit(self, request: Request, row: PlanRow) -> InFlightRow:
        request.num_in_flight += 1
        if row.samples:
            request.num_in_flight_sampling += 1
            request.in_flight_bound += 1 + row.num_drafts
        return InFlightRow(request, request.epoch, row)

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
        """Back to the head of the queue; its tokens stay, its KV is recomputed. Steps in flight still bring tokens.

        Its blocks may be handed out at once: the device runs steps in order, so the step in flight is done with them.
        """
        self._leave_row(request)
        request.epoch += 1
        request.status = Status.WAITING
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.stats.preemptions += 1

    # --- admission --------------------------------------------------------------------------------------------------

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit in order. A request whose adapter is still loading waits alone; one that lacks a device slot holds
        back later requests that would take slots too, so that slots drain towards it."""
        slots_short = False
        for request in list(self.waiting):
            if draft.budget < 1 or not self.free_rows:
                return
            if request.num_in_flight or not self._prepared(request) or (slots_short and request.adapter_uses):
                continue
            granted = self.adapters.take_slots(request.adapter_uses)
            if granted is None:
                slots_short = True
                continue
            slots, loads = granted
            request.root = root_hash(self.adapters.cache_key(request.adapter_uses), request.cache_salt)
            admitted = self.kv.admit(request)
            draft.loads.extend(loads)  # the slot is theirs from now on, admitted or not
            if not admitted:
                self.adapters.release_slots(request.adapter_uses)
                return
            self._enter_row(request, slots, draft)
            self._plan_prefill(request, draft)

    def _prepared(self, request: Request) -> bool:
        try:
            return self.adapters.prepare(request.adapter_uses)
        except AdapterError as error:
            info = ErrorInfo.of(error)
            self._failed.append(RequestOutput(request_id=request.request_id, finish_reason="error", error=info))
            self._finish(request)
            return False

    def _enter_row(self, request: Request, slots: tuple[tuple[int, float], ...], draft: StepDraft) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        request.status = Status.RUNNING
        request.row = self.free_rows.pop()
        request.prefill_end = request.num_tokens
        if request.epoch == 0:
            request.queue_seconds = self.clock() - request.queued_at
            request.cached_tokens = min(request.num_computed_tokens, request.prompt_len)
            self.stats.prompt_tokens += request.prompt_len
        draft.enter(
            NewRow(
                row=request.row, token_ids=list(request.token_ids), prompt_len=request.prompt_len,
                params=request.params, seed=request.seed, stop_ids=request.stop_ids, adapters=slots,
                num_computed=request.num_computed_tokens, num_draft_computed=request.num_draft_computed_tokens,
            )
        )  # fmt: skip
        draft.append_blocks(request, 0)

    # --- commit -----------------------------------------------------------------------------------------------------

    def commit(self, result: StepResult) -> list[RequestOutput]:
        """Take the oldest step's result: append tokens, end requests, offer full blocks to the prefix cache."""
        outputs = self.take_failed()
        for entry, row_result in zip(self.in_flight.popleft(), result.rows, strict=True):
            output = self._commit_row(entry, row_result)
            if output is not None:
                outputs.append(output)
        return outputs

    def take_failed(self) -> list[RequestOutput]:
        """Outputs of requests that ended without a step, because their adapter could not be read."""
        failed, self._failed = self._failed, []
        return failed

    def _commit_row(self, entry: InFlightRow, result: RowResult) -> RequestOutput | None:
        request, epoch, row = entry
        request.num_in_flight -= 1
        if row.samples:
            request.num_in_flight_sampling -= 1
            request.in_flight_bound -= 1 + row.num_drafts
        if request.status is Status.FINISHED:  # it computed once more; that is neither emitted nor counted
            if request.num_in_flight == 0 and request.row is not None:
                self._retire(request)
            return None
        known = request.num_tokens
        output = accept_tokens(request, result) if row.samples else None
        if request.epoch == epoch:
            computed = known + result.num_accepted if row.start is None else row.start + row.num_new
            self.kv.commit(request, computed)
            self._commit_draft(request, row, known, result)
        if output is not None:
            self._count(request, row, result, output)
            if output.finish_reason is not None or request.params.stop:  # a stop string is found further up
                output.speculation = request.stats
            if output.finish_reason is not None:
                self._finish(request)
        return output

    def _commit_draft(self, request: Request, row: PlanRow, known: int, result: RowResult) -> None:
        if row.proposer is None or not self.draft_kv[row.proposer]:
            return
        if row.num_drafts:  # passes wrote the last two tokens and all drafts but the last
            self.kv.commit_draft(request, known + min(result.num_accepted, row.num_drafts - 1))
        else:
            self.kv.commit_draft(request, request.num_draft_computed_tokens + row.draft_prefill)

    def _count(self, request: Request, row: PlanRow, result: RowResult, output: RequestOutput) -> None:
        self.stats.record(row, result, len(output.token_ids))
        if row.num_drafts:
            record_speculation(request.stats, row.num_drafts, result)
        self.adapters.count_tokens(request.adapter_uses, len(output.token_ids), result.num_drafted, result.num_accepted)

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
        self.adapters.release(request.adapter_uses)

    def _leave_row(self, request: Request) -> None:
        assert request.row is not None
        self.kv.release(request)
        self.free_rows.append(request.row)
        request.row = None
        self.adapters.release_slots(request.adapter_uses)

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
