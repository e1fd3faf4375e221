"""StepPacker: inputs of repeated steps are kept, changes are applied all the same, bounds are never kept."""

from __future__ import annotations

import pytest
import torch

from specserve.core.plan import BlockAppend, NewRow, PlanRow, StepPlan
from specserve.core.sampling_params import SamplingParams
from specserve.runtime.rows import DeviceRows
from specserve.runtime.step import MAX_KEPT, StepInputs, StepPacker

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> DeviceRows:
    return DeviceRows(4, 20, slack=4, block_size=4, vocab_size=11, max_adapters=1, dtype=torch.float64, device=CPU)


@pytest.fixture
def packer(rows: DeviceRows) -> StepPacker:
    return StepPacker(rows, {"draft_model": True, "ngram": False}, CPU)


def decode(row: int, num_drafts: int = 0, proposer: str | None = None, bound: int = 8) -> PlanRow:
    return PlanRow(
        request_id=str(row), row=row, num_new=1, num_drafts=num_drafts, proposer=proposer, context_bound=bound
    )


def plan(*plan_rows: PlanRow, new_rows: tuple[NewRow, ...] = (), blocks: tuple[BlockAppend, ...] = ()) -> StepPlan:
    return StepPlan(step_id=0, rows=list(plan_rows), new_rows=list(new_rows), blocks=list(blocks))


def prepared(packer: StepPacker, step: StepPlan) -> StepInputs:
    inputs = packer.prepare(step)
    assert inputs is not None
    return inputs


def test_a_plan_without_rows_only_changes(packer: StepPacker, rows: DeviceRows) -> None:
    assert packer.prepare(plan(blocks=(BlockAppend(2, 1, [7]),))) is None
    assert rows.block_tables[2, :3].tolist() == [0, 7, 0]


def test_what_a_mixed_step_reads(packer: StepPacker) -> None:
    chunk = PlanRow(request_id="c", row=2, num_new=3, start=5, samples=False, draft_prefill=4)
    inputs = prepared(packer, plan(decode(3, 2, "draft_model"), decode(1, 1, "ngram"), decode(0), chunk))
    assert inputs.layout.query_lens == (3, 2, 1, 3)
    assert inputs.layout.positions.tolist() == [-1, -2, -3, -1, -2, -1, 5, 6, 7]
    assert inputs.sample_index is not None
    assert inputs.sample_index.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 5]
    assert inputs.sampling_rows.tolist() == [3, 1, 0]
    assert inputs.catch_up is not None
    assert (inputs.catch_up.rows, inputs.catch_up.query_lens) == ((2,), (4,))
    assert inputs.draft_limits is not None
    assert inputs.draft_limits.tolist() == [2, 0, 0]  # only draft_model keeps KV
    groups = [(g.proposer, g.places, g.rows, g.num_drafts, g.limits.tolist()) for g in inputs.draft_groups]
    assert groups == [("draft_model", (0,), (3,), (2,), [2]), ("ngram", (1,), (1,), (1,), [1])]
    assert [(g.indices.tolist(), g.row_index.tolist()) for g in inputs.draft_groups] == [([0], [3]), ([1], [1])]


def test_the_same_step_again_keeps_its_inputs_and_applies_its_changes(packer: StepPacker, rows: DeviceRows) -> None:
    first = prepared(packer, plan(decode(0), decode(1, 2, "ngram")))
    again = prepared(packer, plan(decode(0), decode(1, 2, "ngram"), blocks=(BlockAppend(1, 0, [6]),)))
    assert again is first
    assert rows.block_tables[1, 0] == 6
    new = NewRow(row=0, token_ids=[5, 4], prompt_len=1, params=SamplingParams(), seed=0, stop_ids=())
    assert prepared(packer, plan(decode(0), decode(1, 2, "ngram"), new_rows=(new,))) is first
    assert rows.num_tokens[0] == 2
    assert first.sampling_rows.tolist() == [0, 1]  # their memory is not the changes'


@pytest.mark.parametrize(
    "other",
    [
        plan(decode(1), decode(0)),
        plan(decode(0)),
        plan(decode(0), decode(1, 1, "ngram")),
        plan(decode(0), decode(2)),
    ],
)
def test_another_step_has_inputs_of_its_own(packer: StepPacker, other: StepPlan) -> None:
    first = prepared(packer, plan(decode(0), decode(1)))
    assert prepared(packer, other) is not first
    assert prepared(packer, plan(decode(0), decode(1))) is first


def test_another_proposer_is_another_step(packer: StepPacker) -> None:
    ngram = prepared(packer, plan(decode(0, 2, "ngram")))
    draft = prepared(packer, plan(decode(0, 2, "draft_model")))
    assert ngram.draft_limits is None and draft.draft_limits is not None


def test_bounds_are_never_kept(packer: StepPacker) -> None:
    """Rows grow while a step's inputs stay the same, so no input may hold what bounds their KV."""
    first, grown = plan(decode(0, bound=8)), plan(decode(0, bound=16))
    assert prepared(packer, grown) is prepared(packer, first)
    held = {name for kind in (StepInputs, type(prepared(packer, first).layout)) for name in kind.__slots__}
    assert not {name for name in held if "bound" in name}


def test_prefill_is_never_kept(packer: StepPacker) -> None:
    chunk = PlanRow(request_id="c", row=2, num_new=3, start=0)
    later = PlanRow(request_id="c", row=2, num_new=3, start=3)
    assert prepared(packer, plan(chunk)).layout.positions.tolist() == [0, 1, 2]
    assert prepared(packer, plan(later)).layout.positions.tolist() == [3, 4, 5]


def test_only_so_many_are_kept(packer: StepPacker) -> None:
    first = prepared(packer, plan(decode(0, 1, "p0")))
    for index in range(1, MAX_KEPT + 1):
        prepared(packer, plan(decode(0, 1, f"p{index}")))
    assert prepared(packer, plan(decode(0, 1, "p0"))) is not first
