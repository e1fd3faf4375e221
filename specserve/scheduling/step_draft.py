"""A step's plan in the making."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from specserve.core.plan import AdapterLoad, BlockAppend, NewRow, PlanRow, StepPlan
from specserve.scheduling.request import Request


class InFlightRow(NamedTuple):
    """A plan row on its way, with the request that it belongs to and the epoch in which it was planned."""

    request: Request
    epoch: int
    row: PlanRow


@dataclass(slots=True)
class StepDraft:
    """`budget`: tokens left; `spare`: how many of them drafts and draft prefill may take; `auto_drafts`: drafts of a
    row whose request names no number."""

    budget: int
    spare: int
    auto_drafts: int
    decodes: list[InFlightRow] = field(default_factory=list)
    prefills: list[InFlightRow] = field(default_factory=list)
    new_rows: list[NewRow] = field(default_factory=list)
    blocks: list[BlockAppend] = field(default_factory=list)
    loads: list[AdapterLoad] = field(default_factory=list)

    @property
    def rows(self) -> list[InFlightRow]:
        """In the plan's order: decodes first."""
        return self.decodes + self.prefills

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

    def plan(self, step_id: int) -> StepPlan:
        return StepPlan(
            step_id=step_id,
            rows=[entry.row for entry in self.rows],
            new_rows=self.new_rows,
            blocks=self.blocks,
            adapter_loads=self.loads,
        )
