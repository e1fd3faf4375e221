"""FakeDevice: keeps true lengths per row as the runner does, checks every plan, accepts a random number of drafts."""

from __future__ import annotations

import random

from schedkit.adapters import FakeAdapters
from specserve.core.plan import PlanRow, RowResult, StepPlan, StepResult


def truth(seed: int, position: int) -> int:
    """The token that request `seed` has at a position: what the fake model would say."""
    return (seed * 31 + position * 7) % 100 + 1


class FakeDevice:
    """`totals`: a request's tokens at its end, by id. Copies into slots begin with the plan that names them."""

    def __init__(self, adapters: FakeAdapters, *, block_size: int, budget: int, seed: int = 0) -> None:
        self.adapters = adapters
        self.block_size = block_size
        self.budget = budget
        self.random = random.Random(seed)
        self.lengths: dict[int, int] = {}
        self.seeds: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.draft_computed: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.totals: dict[str, int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.num_tokens + sum(row.draft_prefill for row in plan.rows) <= self.budget
        for new in plan.new_rows:
            self.adapters.check_live(new.adapters)
            self.lengths[new.row], self.seeds[new.row] = len(new.token_ids), new.seed
            self.computed[new.row], self.draft_computed[new.row] = new.num_computed, new.num_draft_computed
            self.tables[new.row] = []
            assert new.token_ids[new.prompt_len :] == [
                truth(new.seed, p) for p in range(new.prompt_len, len(new.token_ids))
            ]
        for change in plan.blocks:
            table = self.tables[change.row]
            assert len(table) == change.start, "block table has a hole"
            table += change.block_ids
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        self.adapters.begin(plan.adapter_loads)
        return StepResult(step_id=plan.step_id, rows=[self.run_row(row) for row in plan.rows])

    def run_row(self, row: PlanRow) -> RowResult:
        length, k = self.lengths[row.row], row.num_drafts
        capacity = len(self.tables[row.row]) * self.block_size
        if row.start is not None:
            assert row.start == self.computed[row.row] or row.start == length - 1
            self.computed[row.row] = row.start + row.num_new
            assert capacity >= self.computed[row.row]
            if not row.samples:
                return RowResult(token_ids=[])
            assert self.computed[row.row] == length
        else:
            assert self.computed[row.row] == length - 1, "decoding before the prefill ended"
            assert capacity >= min(length + k, self.totals[row.request_id])
        self.draft_computed[row.row] += row.draft_prefill
        if k and row.proposer == "draft":
            assert self.draft_computed[row.row] >= length - 2, "drafting over a gap in the draft's KV"
        accepted = self.random.randint(0, k)
        tokens = [truth(self.seeds[row.row], length + j) for j in range(accepted + 1)]
        self.lengths[row.row] += accepted + 1
        if row.start is None:
            self.computed[row.row] += accepted + 1
        if k and row.proposer == "draft":
            self.draft_computed[row.row] = length + min(accepted, k - 1)
        return RowResult(token_ids=tokens, num_drafted=k, num_accepted=accepted)
