"""A step's plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from specserve.core.plan import AdapterLoad, BlockAppend, NewRow, PlanRow, StepPlan
from specserve.scheduling.cost_model import StepShape
from specserve.scheduling.draft_policy import Choice
from specserve.scheduling.request import Request


class InFlightRow(NamedTuple):
    """A plan row on its way, with the request that it belongs to and the epoch in which it was planned."""

    request: Request
    epoch: int
    row: PlanRow


@dataclass(slots=True)
class StepDraft:
    """`budget`: tokens left; `spare`: how many of them drafts and draft prefill may take; `choice`: drafts of rows
    whose requests name no number."""

    budget: int
    spare: int
    choice: Choice = field(default_factory=Choice)
    decodes: list[InFlightRow] = field(default_factory=list)
    prefills: list[InFlightRow] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    blocks: list[BlockAppend] = field(default_factory=list)
    loads: list[AdapterLoad] = field(default_factory=list)

    @property
    def rows(self) -> list[InFlightRow]:
        """In the plan's order: decodes first."""
        return self.decodes + self.prefills

    def decode(self, request: Request, drafts: int, catch_up: int, bound: int) -> None:
        """One token of a request, `drafts` more to verify after it, and `catch_up` tokens of draft prefill; the KV
        cache then holds `bound` tokens at most."""
        assert request.row is not None
        row = PlanRow(
            request_id=request.request_id, row=request.row, num_new=1, num_drafts=drafts,
            proposer=request.proposer if drafts or catch_up else None,
            draft_prefill=catch_up, context_bound=bound,
        )  # fmt: skip
        request.num_draft_scheduled_tokens += catch_up
        self.budget -= 1 + drafts + catch_up
        self.spare -= drafts + catch_up
        self.decodes.append(_submit(request, row))

    def prefill(self, request: Request, count: int) -> None:
        """The next `count` tokens of what a request has to compute before it can decode."""
        assert request.row is not None
        start = request.num_computed_tokens
        request.num_computed_tokens += count
        row = PlanRow(
            request_id=request.request_id, row=request.row, num_new=count, start=start,
            samples=not request.prefilling, context_bound=start + count,
        )  # fmt: skip
        self.budget -= count
        self.prefills.append(_submit(request, row))

    def arrange(self) -> None:
        """Put decodes with equal adapters side by side: a tile of tokens then uses few, which is read once for all."""
        self.decodes.sort(key=lambda entry: entry.request.slots or ())

    def enter(self, new: NewRow) -> None:
        """A request takes a row; whoever took it earlier in this step, and was preempted, is forgotten."""
        if any(other.row == new.row for other in self.new_rows):
            self.new_rows = [other for other in self.new_rows if other.row != new.row]
            self.blocks = [change for change in self.blocks if change.row != new.row]
        self.new_rows.append(new)

    def append_blocks(self, request: Request, start: int) -> None:
        """Tell the device of the request's blocks from index `start` on, if there are any."""
        if start < len(request.block_ids):
            assert request.row is not None
            self.blocks.append(BlockAppend(request.row, start, request.block_ids[start:]))

    def shape(self) -> StepShape | None:
        """What the step's time depends on; None if it holds more than decodes and verifications."""
        if self.prefills or not self.decodes:
            return None
        dressed = any(entry.request.lora for entry in self.decodes)
        shape = StepShape(len(self.decodes), len(self.decodes), dressed=dressed)
        for _, _, row in self.decodes:
            if row.proposer is None:
                continue
            if row.num_drafts:
                shape.tokens += row.num_drafts
                rows, passes = shape.drafting.get(row.proposer, (0, 0))
                shape.drafting[row.proposer] = (rows + 1, max(passes, row.num_drafts))
            if row.draft_prefill:
                shape.catch_up[row.proposer] = shape.catch_up.get(row.proposer, 0) + row.draft_prefill
        return shape

    def plan(self, step_id: int) -> StepPlan:
        return StepPlan(
            step_id=step_id,
            rows=[entry.row for entry in self.rows],
            new_rows=self.new_rows,
            blocks=self.blocks,
            adapter_loads=self.loads,
        )


def new_row(request: Request) -> NewRow:
    """What the device must know of a request that takes a row."""
    assert request.row is not None and request.slots is not None
    return NewRow(
        row=request.row, token_ids=list(request.token_ids), prompt_len=request.prompt_len, params=request.params,
        seed=request.seed, stop_ids=request.stop_ids, adapters=request.slots, num_computed=request.num_computed_tokens,
        num_draft_computed=request.num_draft_computed_tokens,
    )  # fmt: skip


def _submit(request: Request, row: PlanRow) -> InFlightRow:
    request.num_in_flight += 1
    if row.samples:
        request.num_in_flight_sampling += 1
        request.in_flight_bound += 1 + row.num_drafts
    return InFlightRow(request, request.epoch, row)
