"""Layouts: where each token of a forward comes from, and which tokens' logits are wanted; buckets of graphs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from specserve.core.plan import PlanRow
from specserve.runtime.graphs import buckets
from specserve.runtime.layout import StepLayout, pack_layout, sample_index, uniform_layout
from specserve.runtime.packing import Packer

CPU = torch.device("cpu")


def packed(rows: list[int], query_lens: list[int], starts: Sequence[int | None] = ()) -> StepLayout:
    packer = Packer()
    packer.add([77])  # something else lies before it
    layout = pack_layout(rows, query_lens, packer, starts)
    packer.upload(CPU)
    return layout.on_device(packer)


def plan_row(num_new: int = 1, num_drafts: int = 0, *, start: int | None = None, samples: bool = True) -> PlanRow:
    return PlanRow(request_id="", row=0, num_new=num_new, num_drafts=num_drafts, start=start, samples=samples)


def test_ragged_layout() -> None:
    layout = packed([4, 0, 2], [1, 3, 2])
    assert (layout.rows, layout.query_lens) == ((4, 0, 2), (1, 3, 2))
    assert layout.row_index.tolist() == [4, 0, 2]
    assert layout.query_start.tolist() == [0, 1, 4, 6]
    assert layout.token_rows.tolist() == [4, 0, 0, 0, 2, 2]
    assert layout.positions.tolist() == [-1, -1, -2, -3, -1, -2]


def test_positions_of_chunks_are_the_plans() -> None:
    """Those of decodes and verifications count from the row's last token, which only the device knows."""
    assert packed([4, 0, 2], [1, 2, 3], [None, 7, 0]).positions.tolist() == [-1, 7, 8, 0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_uniform_layout_is_the_ragged_one(count: int) -> None:
    rows = (3, 1, 5)
    ours, ragged = uniform_layout(rows, torch.tensor(rows), count), packed(list(rows), [count] * 3)
    assert (ours.rows, ours.query_lens) == (ragged.rows, ragged.query_lens)
    for name in ("row_index", "query_start", "token_rows", "positions"):
        assert torch.equal(getattr(ours, name), getattr(ragged, name)), name


def test_rows_of_a_decode_layout_may_be_rewritten() -> None:
    """Graphs write other rows into `row_index`; with one token each, `token_rows` must follow."""
    layout = uniform_layout((9, 9), torch.tensor([9, 9]), 1)
    layout.row_index.copy_(torch.tensor([2, 5]))
    assert layout.token_rows.tolist() == [2, 5]


@pytest.mark.parametrize(
    ("rows", "index"),
    [
        ([plan_row(), plan_row()], None),
        ([plan_row(num_drafts=2), plan_row(num_drafts=2)], None),
        # fewer drafts: the last token again
        ([plan_row(num_drafts=2), plan_row(), plan_row(num_drafts=1)], [0, 1, 2, 3, 3, 3, 4, 5, 5]),
        ([plan_row(), plan_row(4, start=0)], [0, 4]),  # of a prompt, its last token
        ([plan_row(), plan_row(4, start=0, samples=False)], [0]),
        ([plan_row(num_drafts=1), plan_row(3, start=2)], [0, 1, 4, 4]),
        ([plan_row(4, start=0, samples=False)], []),
        ([plan_row(1, start=0)], None),
    ],
)
def test_wanted_tokens(rows: list[PlanRow], index: list[int] | None) -> None:
    assert sample_index(rows) == index


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (4, [1, 2, 4]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (24, [1, 2, 4, 8, 16, 24]),
    ],
)
def test_buckets(max_rows: int, sizes: list[int]) -> None:
    assert buckets(max_rows) == sizes
