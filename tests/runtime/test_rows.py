"""DeviceRows: what a plan changes is on the device afterwards, and nothing else is changed."""

from __future__ import annotations

import pytest
import torch

from specserve.core.plan import BlockAppend, NewRow
from specserve.core.sampling_params import SamplingParams
from specserve.runtime.packing import Packer
from specserve.runtime.rows import DeviceRows

CPU = torch.device("cpu")
MAX_NUM_SEQS = 3


@pytest.fixture
def rows() -> DeviceRows:
    return DeviceRows(
        MAX_NUM_SEQS, 20, slack=4, block_size=4, vocab_size=11, max_adapters=2, dtype=torch.float64, device=CPU
    )


def new_row(row: int, *token_ids: int, adapters: tuple[tuple[int, float], ...] = (), drafted: int = 0) -> NewRow:
    return NewRow(
        row=row, token_ids=list(token_ids), prompt_len=len(token_ids), params=SamplingParams(), seed=row, stop_ids=(),
        adapters=adapters, num_draft_computed=drafted,
    )  # fmt: skip


def change(rows: DeviceRows, new: list[NewRow], blocks: list[BlockAppend]) -> None:
    packer = Packer()
    changes = rows.pack(new, blocks, packer)
    packer.upload(CPU)
    if changes is not None:
        rows.apply(changes, packer)


def test_no_change_sends_nothing(rows: DeviceRows) -> None:
    packer = Packer()
    assert rows.pack([], [], packer) is None
    assert packer.add([1]) == slice(0, 1)


def test_a_new_row_lies_in_its_place(rows: DeviceRows) -> None:
    change(rows, [new_row(1, 5, 6, 7, adapters=((3, 0.5),), drafted=2)], [BlockAppend(1, 0, [8])])
    assert rows.history[1, :3].tolist() == [5, 6, 7]
    assert rows.block_tables[1].tolist() == [8, 0, 0, 0, 0, 0]
    assert (rows.num_tokens[1], rows.num_draft_computed[1]) == (3, 2)
    assert rows.adapter_slots[1].tolist() == [3, -1]
    assert rows.adapter_weights[1].tolist() == [0.5, 0.0]
    assert rows.adapters[1] == ((3, 0.5),)


def test_nothing_is_left_of_a_tenant_with_more_blocks_and_adapters(rows: DeviceRows) -> None:
    first = new_row(2, *range(1, 10), adapters=((0, 1.0), (1, -0.25)), drafted=9)
    change(rows, [first], [BlockAppend(2, 0, [5, 6, 7])])
    change(rows, [], [BlockAppend(2, 3, [9])])
    change(rows, [new_row(2, 4)], [BlockAppend(2, 0, [3])])
    assert rows.block_tables[2].tolist() == [3, 0, 0, 0, 0, 0]
    assert (rows.num_tokens[2], rows.num_draft_computed[2], rows.history[2, 0]) == (1, 0, 4)
    assert rows.adapter_slots[2].tolist() == [-1, -1]
    assert rows.adapter_weights[2].tolist() == [0.0, 0.0]


def test_blocks_are_appended_to_new_rows_and_old_ones(rows: DeviceRows) -> None:
    change(rows, [new_row(0, 1), new_row(1, 2)], [BlockAppend(1, 0, [4, 5]), BlockAppend(0, 0, [6])])
    change(rows, [new_row(2, 3)], [BlockAppend(0, 1, [7, 8]), BlockAppend(2, 0, [9]), BlockAppend(0, 3, [10])])
    assert rows.block_tables[:3].tolist() == [[6, 7, 8, 10, 0, 0], [4, 5, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0]]


def test_the_padding_row_stays_as_it_is(rows: DeviceRows) -> None:
    everyone = [new_row(row, *range(1, 21), adapters=((0, 1.0), (1, 1.0))) for row in range(MAX_NUM_SEQS)]
    change(rows, everyone, [BlockAppend(row, 0, [1, 2, 3, 4, 5, 6]) for row in range(MAX_NUM_SEQS)])
    assert rows.padding_row == MAX_NUM_SEQS
    assert rows.num_tokens[rows.padding_row] == 1
    assert not rows.history[rows.padding_row].any()
    assert not rows.block_tables[rows.padding_row].any()
    assert rows.adapter_slots[rows.padding_row].tolist() == [-1, -1]
    assert not rows.adapter_weights[rows.padding_row].any()
