"""A step on its way: what the device was asked for, and the StepResult once it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specserve.core.messages import TokenLogprobs
from specserve.core.plan import AdapterLoad, PlanRow, RowResult, StepPlan, StepResult
from specserve.device import Download
from specserve.runtime.logprobs import token_logprobs
from specserve.sampling.logprobs import Logprobs


class Ticket(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it gave."""
        ...


class Executor(Protocol):
    """Runs submitted plans strictly in order; a plan may be submitted before the results of those before it came.

    A plan's adapter loads begin with it and take their own time; `loaded` tells which ended since the last call, and
    never waits. No plan may name a slot whose load has not been told of.
    """

    def submit(self, plan: StepPlan) -> Ticket: ...
    def loaded(self) -> list[AdapterLoad]: ...


@dataclass(frozen=True, slots=True)
class EmptyStep:
    """A step in which no row samples."""

    plan: StepPlan

    def result(self) -> StepResult:
        return StepResult(step_id=self.plan.step_id, rows=[RowResult(token_ids=[]) for _ in self.plan.rows])


@dataclass(frozen=True, slots=True)
class AskedLogprobs:
    """What the sampling rows `asking` want of their tokens' log-probabilities: `top[i]` of the likeliest each."""

    asking: list[int]
    top: list[int]
    found: Logprobs


class SampledStep:
    """A step whose S sampling rows have committed tokens.

    `committed` [S, K+2] int64: count, then tokens; `drafted` [S] int64: drafts that were verified (None: none).
    """

    def __init__(
        self,
        plan: StepPlan,
        committed: Tensor,
        drafted: Tensor | None,
        logprobs: AskedLogprobs | None,
    ) -> None:
        self._plan = plan
        self._has_drafts = drafted is not None
        self._logprobs = logprobs
        extra = () if drafted is None else (drafted,)
        self._download = Download(committed, *extra, *(logprobs.found if logprobs is not None else ()))

    def result(self) -> StepResult:
        committed, *rest = self._download.wait()
        drafted = rest.pop(0).tolist() if self._has_drafts else None
        logprobs = self._token_logprobs(committed[:, 1:], rest)
        return StepResult(
            step_id=self._plan.step_id,
            rows=_row_results(self._plan.rows, committed.tolist(), drafted, logprobs),
        )

    def _token_logprobs(self, tokens: Tensor, arrived: Sequence[Tensor]) -> dict[int, list[TokenLogprobs]]:
        """By sampling row; rows that asked for none are absent."""
        if self._logprobs is None:
            return {}
        asked = self._logprobs
        found = token_logprobs(tokens[asked.asking], Logprobs(*arrived), asked.top)
        return dict(zip(asked.asking, found, strict=True))


def _row_results(
    plan_rows: Sequence[PlanRow],
    committed: list[list[int]],
    drafted: list[int] | None,
    logprobs: dict[int, list[TokenLogprobs]],
) -> list[RowResult]:
    results = []
    index = 0  # among the sampling rows
    for row in plan_rows:
        if not row.samples:
            results.append(RowResult(token_ids=[]))
            continue
        count, *tokens = committed[index]
        own = logprobs.get(index)
        results.append(
            RowResult(
                token_ids=tokens[:count],
                num_drafted=drafted[index] if drafted is not None else 0,
                num_accepted=count - 1,
                logprobs=own[:count] if own is not None else None,
            )
        )
        index += 1
    return results
