"""Trials measure steps, keep to their time, and leave nothing in the engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from specserve.core.plan import AdapterLoad, StepPlan, StepResult
from specserve.engine.core.costs import measure_costs
from specserve.engine.core.step_clock import StepClock
from specserve.runtime.trials import Trials, uniform
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS


@dataclass
class Machine:
    """Steps that take as long as `seconds` says, one behind the other, on a clock of their own."""

    now: float = 0.0
    free_at: float = 0.0
    plans: deque[StepPlan] = field(default_factory=deque)

    def clock(self) -> float:
        return self.now

    def seconds(self, plan: StepPlan) -> float:
        drafts = [row.num_drafts for row in plan.rows]
        passes = max(drafts) if any(row.proposer == "draft_model" for row in plan.rows) else 0
        behind = sum(row.draft_prefill for row in plan.rows)
        drafting = (0.002 + 0.001 * (passes - 1)) if passes else 0.0
        return 0.010 + 0.0001 * (len(drafts) + sum(drafts)) + (0.003 if any(drafts) else 0.0) + drafting + 1e-5 * behind

    def submit(self, plan: StepPlan) -> Done:
        self.plans.append(plan)
        self.free_at = max(self.free_at, self.now) + self.seconds(plan)
        return Done(self, plan, self.free_at)

    def notice(self) -> None:
        """The host sees a result."""

    def loaded(self) -> list[AdapterLoad]:
        return []


@dataclass
class Done:
    machine: Machine
    plan: StepPlan
    at: float

    def result(self) -> StepResult:
        self.machine.now = max(self.machine.now, self.at)
        self.machine.notice()
        return StepResult(step_id=0, rows=[])


@pytest.mark.parametrize("depth", [1, 2])
def test_a_table_is_what_the_machine_takes(depth: int) -> None:
    machine = Machine()
    trials = Trials(machine, max_model_len=2048, depth=depth, seconds=60.0, clock=machine.clock)
    table = measure_costs(trials, max_rows=48, max_tokens=8192, proposers=["draft_model", "ngram", "ngram+draft_model"])
    assert table is not None and set(table.drafting) == {"draft_model", "ngram+draft_model"}
    for rows in (1, 8, 20, 48):
        assert table.decode(rows) == pytest.approx(10.0 + 0.1 * rows)
        for tokens in (rows + 1, 2 * rows, 4 * rows, 9 * rows):
            if rows < tokens <= 512:
                assert table.target(rows, tokens) == pytest.approx(13.0 + 0.1 * tokens, rel=0.02)
        assert table.draft("draft_model", rows, 5) == pytest.approx(6.0)
    assert table.catch_up("ngram+draft_model", 300) == pytest.approx(3.0)


class Stepped(Machine):
    """Steps of more than 128 tokens are another kind."""

    def seconds(self, plan: StepPlan) -> float:
        tokens = sum(1 + row.num_drafts for row in plan.rows)
        return super().seconds(plan) + (0.02 if tokens > 128 else 0.0)


def test_what_lies_before_a_jump_is_not_thought_dear() -> None:
    """With 32 rows three drafts are the last before it."""
    machine = Stepped()
    trials = Trials(machine, max_model_len=2048, depth=1, seconds=60.0, clock=machine.clock)
    table = measure_costs(trials, max_rows=64, max_tokens=8192, proposers=["draft_model", "ngram"])
    assert table is not None
    for tokens in (64, 96, 128):
        assert table.target(32, tokens) == pytest.approx(13.0 + 0.1 * tokens)
    assert table.target(32, 160) == pytest.approx(33.0 + 0.1 * 160)
    tried = {tuple(row.num_drafts for row in plan.rows) for plan in machine.plans}
    assert (3,) * 32 in tried and (3,) * 8 not in tried, "only where it jumps"


class Distracted(Machine):
    """Every other result is noticed 4 ms late, while the next step runs on."""

    def notice(self) -> None:
        if len(self.plans) % 2:
            self.now += 0.004


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_is_not_thought_short_because_the_one_before_was_noticed_late(depth: int) -> None:
    machine = Distracted()
    trials = Trials(machine, max_model_len=2048, depth=depth, seconds=60.0, clock=machine.clock)
    assert trials.milliseconds(uniform(5, 0, None)) == pytest.approx(10.5, abs=1.5)


def test_trials_end_in_time_and_begin_with_what_matters_most() -> None:
    machine = Machine()
    trials = Trials(machine, max_model_len=2048, depth=1, seconds=0.3, clock=machine.clock)
    table = measure_costs(trials, max_rows=256, max_tokens=2048, proposers=["draft_model", "ngram"])
    assert machine.now < 0.45
    assert table is not None and table.verify and table.draft("draft_model", 1, 4) == pytest.approx(5.0)
    assert max(len(plan.rows) for plan in machine.plans) <= 8


def test_where_time_ended_after_one_verification_tokens_are_not_thought_free() -> None:
    machine = Machine()
    plain = 4 * 0.0101  # a warm step and three that count
    first = plain + 4 * (0.0132 + 0.0152) + 4 * (0.0135 + 0.0185) + 4 * 0.0108 + 4 * 0.0146 - 0.01
    trials = Trials(machine, max_model_len=2048, depth=1, seconds=first, clock=machine.clock)
    table = measure_costs(trials, max_rows=8, max_tokens=2048, proposers=["draft_model", "ngram"])
    assert table is not None and [rows for rows, _ in table.verify] == [1, 8]
    assert table.target(8, 40) > table.target(8, 16) + 5.0


def test_no_time_is_no_table() -> None:
    machine = Machine()
    trials = Trials(machine, max_model_len=2048, depth=1, seconds=-1.0, clock=machine.clock)
    assert measure_costs(trials, max_rows=4, max_tokens=64, proposers=["ngram"]) is None
    assert not machine.plans


def test_trials_stay_within_a_short_context() -> None:
    machine = Machine()
    trials = Trials(machine, max_model_len=16, depth=2, seconds=9.0, clock=machine.clock)
    assert trials.milliseconds(uniform(4, MAX_AUTO_DRAFTS, "ngram")) is not None
    assert all(len(new.token_ids) <= 8 for plan in machine.plans for new in plan.new_rows)
    assert all(row.context_bound <= 16 for plan in machine.plans for row in plan.rows)


def test_step_clock_does_not_count_idleness() -> None:
    times = iter((1.0, 1.5, 7.0, 7.25))
    clock = StepClock(lambda: next(times))
    assert clock.ended() is None
    assert clock.ended() == 500.0
    clock.idle()
    assert clock.ended() is None
    assert clock.ended() == 250.0


def test_rows_take_turns_in_slots_where_there_are_adapters() -> None:
    for slots, wanted in ((0, [()] * 3), (2, [((0, 1.0),), ((1, 1.0),), ((0, 1.0),)])):
        machine = Machine()
        trials = Trials(machine, max_model_len=2048, depth=2, seconds=9.0, slots=slots, clock=machine.clock)
        trials.milliseconds(uniform(3, 1, "ngram"))
        assert [new.adapters for new in machine.plans[0].new_rows] == wanted


class Slow(Machine):
    """A draft's prefill takes a millisecond for ten tokens."""

    def seconds(self, plan: StepPlan) -> float:
        return super().seconds(plan) + 1e-4 * sum(row.draft_prefill for row in plan.rows)


def test_long_draft_prefill_is_tried_where_it_is_fast() -> None:
    for machine, most in ((Machine(), 1024), (Slow(), 256)):
        trials = Trials(machine, max_model_len=2048, depth=1, seconds=60.0, clock=machine.clock)
        measure_costs(trials, max_rows=8, max_tokens=2048, proposers=["draft_model"])
        assert max(row.draft_prefill for plan in machine.plans for row in plan.rows) == most
