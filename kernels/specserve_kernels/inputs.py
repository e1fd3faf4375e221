"""What a forward's tokens are and where their keys and values go, looked up in the device rows.

    input_ids[t] = history[row, p],   slots[t] = block_tables[row, p // block_size] * block_size + p % block_size

row = token_rows[t] and p = positions[t], both [T] int64; history [R, width] and block_tables [R, max_blocks] int64.
A position that was never given a block is in block 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import tl, triton

BLOCK = 128


def gather_inputs_ref(
    token_rows: Tensor, positions: Tensor, history: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    blocks = block_tables[token_rows, positions // block_size]
    return history[token_rows, positions], blocks * block_size + positions % block_size


@triton.jit
def _gather_inputs_kernel(
    token_rows, positions, history, block_tables, input_ids, slots,
    num_tokens, width, max_blocks, block_size, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    row = tl.load(token_rows + token, mask=inside, other=0)
    position = tl.load(positions + token, mask=inside, other=0)
    tl.store(input_ids + token, tl.load(history + row * width + position, mask=inside), mask=inside)
    block = tl.load(block_tables + row * max_blocks + position // block_size, mask=inside)
    tl.store(slots + token, block * block_size + position % block_size, mask=inside)


def gather_inputs_triton(
    token_rows: Tensor, positions: Tensor, history: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    tokens = positions.shape[0]
    input_ids, slots = torch.empty_like(positions), torch.empty_like(positions)
    _gather_inputs_kernel[(triton.cdiv(tokens, BLOCK),)](
        token_rows, positions, history, block_tables, input_ids, slots,
        tokens, history.shape[1], block_tables.shape[1], block_size, BLOCK=BLOCK,
    )  # fmt: skip
    return input_ids, slots


_IMPLEMENTATIONS = {"torch": gather_inputs_ref, "triton": gather_inputs_triton}


def gather_inputs(
    token_rows: Tensor, positions: Tensor, history: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """(input_ids [T], slots [T]) of tokens at `positions` of device rows `token_rows`."""
    assert token_rows.shape == positions.shape, (token_rows.shape, positions.shape)
    assert history.is_contiguous() and block_tables.is_contiguous()
    implementation = _IMPLEMENTATIONS[backend(positions, _IMPLEMENTATIONS)]
    return implementation(token_rows, positions, history, block_tables, block_size)
