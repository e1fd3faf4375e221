"""Rows of a table by number: token embeddings, the cos and sin of positions.

out[t] = table[index[t]],   table [N, …] dense, index [T] int64, out [T, …]
"""

from __future__ import annotations

from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched

BLOCK = 1024


def gather_rows_ref(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index)


@relaunched
@triton.jit
def _gather_rows_kernel(table, index, out, width, BLOCK: tl.constexpr):
    """Program (t, c): columns c * BLOCK … of row index[t]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + token)
    values = tl.load(table + row * width + column, mask=column < width)
    tl.store(out + token * width + column, values, mask=column < width)


def gather_rows_triton(table: Tensor, index: Tensor) -> Tensor:
    width = table[0].numel()
    out = table.new_empty(index.shape[0], *table.shape[1:])
    block = min(BLOCK, power_of_2(width))
    _gather_rows_kernel[(index.shape[0], cdiv(width, block))](table, index, out, width, BLOCK=block)
    return out


_IMPLEMENTATIONS = {"torch": gather_rows_ref, "triton": gather_rows_triton}


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], a new tensor. Every index must be a row of the table."""
    assert table.is_contiguous(), table.stride()
    return _IMPLEMENTATIONS[backend(table, _IMPLEMENTATIONS)](table, index)
