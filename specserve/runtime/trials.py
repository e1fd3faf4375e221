"""What steps cost, found by running some: whole steps through the runner, with whatever runs inside them.

Trial requests take real rows, which must be free, and have no blocks: all that they write goes to block 0. Whoever
takes the rows next finds nothing of them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specserve.core.plan import NewRow, PlanRow, StepPlan
from specserve.core.sampling_params import SamplingParams
from specserve.runtime.ticket import Executor, Ticket

RUNS = 3  # of each kind of step, after one that is not counted; the fastest counts, for noise only adds
QUEUED_WINDOWS = 2  # of RUNS steps where steps are queued: the fastest mean counts
CONTEXT = 64  # tokens of a trial request


@dataclass(frozen=True, slots=True)
class Trial:
    """A step of so many decode rows: `drafts` of each, by `proposer`; `catch_up` tokens of draft prefill before it."""

    drafts: tuple[int, ...]
    proposer: str | None = None
    catch_up: int = 0


class Trials:
    """Runs trials on an executor with steps queued `depth` deep, and begins none when `seconds` have passed. Their rows
    take turns in the first `slots` adapter slots; 0: they have no adapters."""

    def __init__(
        self,
        executor: Executor,
        *,
        max_model_len: int,
        depth: int,
        seconds: float,
        slots: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._executor = executor
        self._max_model_len = max_model_len
        self._depth = depth
        self._slots = slots
        self._clock = clock
        self._end = clock() + seconds

    def milliseconds(self, trial: Trial) -> float | None:
        """A step's time, from one result to the next; None: there is no time left, or no room in a context."""
        length = min(CONTEXT, self._max_model_len // 2) if not trial.catch_up else trial.catch_up + 2
        begin = self._clock()
        if length > self._max_model_len or begin > self._end:
            return None
        self._executor.submit(self._plan(trial, length, enter=True)).result()
        last = self._clock()
        # A queued step goes on while the result before it is noticed late, and then seems short: only the mean of
        # several is what steps take.
        window, windows = (1, RUNS) if self._depth == 1 else (RUNS, QUEUED_WINDOWS)
        if last + window * windows * (last - begin) >= self._end:
            windows = 1
        best = math.inf
        tickets: deque[Ticket] = deque()
        for run in range(1 - self._depth, window * windows):  # the first ones have none before them to hide behind
            tickets.append(self._executor.submit(self._plan(trial, length, enter=bool(trial.catch_up))))
            if len(tickets) < self._depth:
                continue
            tickets.popleft().result()
            if run < 0:
                last = self._clock()
            elif (run + 1) % window == 0:
                now = self._clock()
                best, last = min(best, (now - last) / window), now
        for ticket in tickets:
            ticket.result()
        return 1000.0 * best

    def _plan(self, trial: Trial, length: int, *, enter: bool) -> StepPlan:
        rows = range(len(trial.drafts))
        bound = length + (RUNS * QUEUED_WINDOWS + self._depth + 2) * (1 + max(trial.drafts))
        return StepPlan(
            step_id=0,
            rows=[
                PlanRow(
                    request_id="", row=row, num_new=1, num_drafts=drafts,
                    proposer=trial.proposer if drafts or trial.catch_up else None,
                    draft_prefill=trial.catch_up, context_bound=min(bound, self._max_model_len),
                )
                for row, drafts in zip(rows, trial.drafts, strict=True)
            ],
            new_rows=[self._new_row(row, length, trial) for row in rows] if enter else [],
        )  # fmt: skip

    def _new_row(self, row: int, length: int, trial: Trial) -> NewRow:
        return NewRow(
            row=row, token_ids=[1] * length, prompt_len=length, params=SamplingParams(temperature=0.0), seed=0,
            stop_ids=(), num_computed=length - 1, num_draft_computed=0 if trial.catch_up else length,
            adapters=((row % self._slots, 1.0),) if self._slots else (),
        )  # fmt: skip


def uniform(rows: int, drafts: int, proposer: str | None) -> Trial:
    return Trial((drafts,) * rows, proposer)


def one_draft(rows: int, proposer: str) -> Trial:
    """A single draft among the rows: what leaving the decode step costs."""
    return Trial((1, *(0,) * (rows - 1)), proposer)


def trial_rows(max_rows: int) -> Sequence[int]:
    """Numbers of rows to try, the most telling first."""
    wanted = (1, 8, 32, 128, max_rows, 64, 16)
    return [rows for rows in dict.fromkeys(wanted) if rows <= max_rows]
