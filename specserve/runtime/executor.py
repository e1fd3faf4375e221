"""Executors: run plans in order and hand out tickets; the result is asked for later, possibly a step later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from specserve.core.plan import StepPlan, StepResult


class Ticket(Protocol):
    """A step on its way."""

    def result(self) -> StepResult:
        """Wait for the step and return what it gave."""
        ...


class Executor(Protocol):
    """Runs submitted plans strictly in order."""

    def submit(self, plan: StepPlan) -> Ticket: ...


@dataclass(frozen=True, slots=True)
class DoneTicket:
    """A step that has already run."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class InlineExecutor:
    """Runs each plan when it is submitted. At pipeline depth 2 its results are still read one step late, so a plan is
    always made without the result of the step before it, as on a device."""

    def __init__(self, execute: Callable[[StepPlan], StepResult]) -> None:
        self._execute = execute

    def submit(self, plan: StepPlan) -> DoneTicket:
        return DoneTicket(self._execute(plan))
