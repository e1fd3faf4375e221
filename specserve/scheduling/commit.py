"""What a step's result means for the requests of its rows: tokens appended, blocks offered, everything counted."""

from __future__ import annotations

from collections.abc import Mapping

from specserve.core.messages import RequestOutput
from specserve.core.plan import PlanRow, RowResult
from specserve.scheduling.adapter_slots import AdapterSlots
from specserve.scheduling.draft_policy import DraftPolicy
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.outputs import accept_tokens, record_speculation
from specserve.scheduling.request import Request, Status
from specserve.scheduling.stats import SchedulerStats
from specserve.scheduling.step_draft import InFlightRow
from specserve.scheduling.waiting import WaitingLine


class Committer:
    """Takes row results in; whose request ends by that is the scheduler's to see to."""

    def __init__(
        self,
        kv: KVCacheManager,
        adapters: AdapterSlots,
        waiting: WaitingLine,
        policy: DraftPolicy,
        draft_kv: Mapping[str, bool],
    ) -> None:
        self.stats = SchedulerStats()
        self._kv = kv
        self._adapters = adapters
        self._waiting = waiting
        self._policy = policy
        self._draft_kv = draft_kv

    def commit(self, entry: InFlightRow, result: RowResult) -> RequestOutput | None:
        """One row's result; None where it brings its request nothing to emit."""
        request, epoch, row = entry
        request.num_in_flight -= 1
        if row.samples:
            request.num_in_flight_sampling -= 1
            request.in_flight_bound -= 1 + row.num_drafts
        if request.status is Status.FINISHED:  # it computed once more; that is neither emitted nor counted
            return None
        known = request.num_tokens
        output = accept_tokens(request, result) if row.samples else None
        if request.epoch == epoch:
            computed = known + result.num_accepted if row.start is None else row.start + row.num_new
            self._kv.commit(request, computed)
            self._commit_draft(request, row, known, result)
        if output is not None:
            self._count(request, row, result, output)
            if output.finish_reason is not None or request.params.stop:  # a stop string is found further up
                output.speculation = request.stats
        return output

    def _commit_draft(self, request: Request, row: PlanRow, known: int, result: RowResult) -> None:
        if row.proposer is None or not self._draft_kv[row.proposer]:
            return
        if row.num_drafts:  # passes wrote the last two tokens and all drafts but the last
            self._kv.commit_draft(request, known + min(result.num_accepted, row.num_drafts - 1))
        else:
            self._kv.commit_draft(request, request.num_draft_computed_tokens + row.draft_prefill)

    def _count(self, request: Request, row: PlanRow, result: RowResult, output: RequestOutput) -> None:
        emitted = len(output.token_ids)
        self.stats.record(row, result, emitted)
        self._waiting.charge(request, emitted)
        if row.num_drafts:
            record_speculation(request.stats, row.num_drafts, result)
            self._policy.note(request, row.num_drafts, result.num_accepted)
        self._adapters.count_tokens(request.adapter_uses, emitted, result.num_drafted, result.num_accepted)
