"""StepDraft: a row has one tenant in a plan, for the device writes a plan's changes in no particular order."""

from __future__ import annotations

from schedkit.desk import Desk
from specserve.core.plan import BlockAppend, NewRow
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.step_draft import StepDraft


def new_row(row: int, *token_ids: int) -> NewRow:
    return NewRow(
        row=row, token_ids=list(token_ids), prompt_len=len(token_ids), params=SamplingParams(), seed=0, stop_ids=()
    )


def test_of_two_tenants_in_one_step_only_the_later_one_is_told() -> None:
    draft = StepDraft(budget=8, spare=0)
    earlier, neighbour, later = new_row(2, 1, 2), new_row(0, 3), new_row(2, 4)
    draft.enter(earlier)
    draft.blocks.append(BlockAppend(2, 0, [5, 6, 7]))
    draft.enter(neighbour)
    draft.blocks.append(BlockAppend(0, 0, [8]))
    draft.enter(later)
    draft.blocks.append(BlockAppend(2, 0, [9]))
    plan = draft.plan(1)
    assert plan.new_rows == [neighbour, later]
    assert plan.blocks == [BlockAppend(0, 0, [8]), BlockAppend(2, 0, [9])]


def test_blocks_of_a_row_that_nobody_enters_stay() -> None:
    draft = StepDraft(budget=8, spare=0)
    draft.blocks.append(BlockAppend(1, 3, [5]))
    draft.enter(new_row(2, 1))
    assert draft.plan(1).blocks == [BlockAppend(1, 3, [5])]


def test_decodes_of_one_adapter_stand_side_by_side() -> None:
    """In order of arrival among themselves; prompts come behind, whatever their adapter."""
    desk = Desk(rows=8)
    for index in range(6):
        desk.add(f"x{index}", *(((), ("a",), ("b",))[index % 3]), answer=20)
    desk.step(4)
    desk.add("new0", prompt=9)
    rows = desk.scheduler.schedule().rows
    requests = [desk.scheduler.requests[row.request_id] for row in rows]
    assert sorted(row.request_id for row in rows[:6]) == [f"x{index}" for index in range(6)]
    assert [request.slots for request in requests[:6]] == sorted(request.slots or () for request in requests[:6])
    assert [row.request_id for row in rows[:2]] == ["x0", "x3"] and rows[6].request_id == "new0"
