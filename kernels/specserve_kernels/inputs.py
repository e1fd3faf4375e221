"""What a forward's tokens are and where their keys and values go, looked up in the device rows.

    p = positions[t], or where that is negative num_tokens[row] - 2 - positions[t]: -1 is the row's last token, -2 the
        one behind it, and so on, wherever the row stands by now
    input_ids[t] = history[row, p],   slots[t] = block_tables[row, p // block_size] * block_size + p % block_size

row = token_rows[t]; token_rows, positions [T], num_tokens [R], history [R, width] and block_tables [R, max_blocks] are
int64. A position that was never given a block is in block 0. The positions that come back are at most `last_position`:
rows that overran their end compute something, but nothing out of bounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched

BLOCK = 128


class TokenInputs(NamedTuple):
    """Each [T] int64."""

    input_ids: Tensor
    positions: Tensor
    slots: Tensor


class RowTables(NamedTuple):
    """The device rows that tokens are looked up in."""

    num_tokens: Tensor
    history: Tensor
    block_tables: Tensor


def gather_inputs_ref(
    token_rows: Tensor, positions: Tensor, tables: RowTables, block_size: int, last_position: int
) -> TokenInputs:
    positions = torch.where(positions < 0, tables.num_tokens[token_rows] - 2 - positions, positions)
    blocks = tables.block_tables[token_rows, positions // block_size]
    slots = blocks * block_size + positions % block_size
    return TokenInputs(tables.history[token_rows, positions], positions.clamp(max=last_position), slots)


@relaunched
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["token_rows", "positions"])
def _gather_inputs_kernel(
    token_rows, positions, num_tokens, history, block_tables, input_ids, places, slots,
    count, width, max_blocks, block_size, last_position, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    row = tl.load(token_rows + token, mask=inside, other=0)
    position = tl.load(positions + token, mask=inside, other=0)
    behind = tl.load(num_tokens + row, mask=inside & (position < 0), other=0) - 2 - position
    position = tl.where(position < 0, behind, position)
    tl.store(input_ids + token, tl.load(history + row * width + position, mask=inside), mask=inside)
    block = tl.load(block_tables + row * max_blocks + position // block_size, mask=inside)
    tl.store(slots + token, block * block_size + position % block_size, mask=inside)
    tl.store(places + token, tl.minimum(position, last_position), mask=inside)


def gather_inputs_triton(
    token_rows: Tensor, positions: Tensor, tables: RowTables, block_size: int, last_position: int
) -> TokenInputs:
    count = token_rows.shape[0]
    # Each begins at 16 bytes: for pointers that do not, whoever reads them would be compiled once more.
    found = TokenInputs(*token_rows.new_empty(3, count + count % 2)[:, :count].unbind(0))
    _gather_inputs_kernel[(cdiv(count, BLOCK),)](
        token_rows, positions, *tables, *found, count, tables.history.shape[1], tables.block_tables.shape[1],
        block_size, last_position, BLOCK=BLOCK,
    )  # fmt: skip
    return found


_IMPLEMENTATIONS = {"torch": gather_inputs_ref, "triton": gather_inputs_triton}


def gather_inputs(
    token_rows: Tensor, positions: Tensor, tables: RowTables, block_size: int, last_position: int
) -> TokenInputs:
    """Ids, positions and slots of T tokens of the device rows `token_rows`."""
    assert token_rows.shape == positions.shape, (token_rows.shape, positions.shape)
    assert tables.history.is_contiguous() and tables.block_tables.is_contiguous()
    implementation = _IMPLEMENTATIONS[backend(token_rows, _IMPLEMENTATIONS)]
    return implementation(token_rows, positions, tables, block_size, last_position)
