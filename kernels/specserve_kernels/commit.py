"""The end of a step: each row's verified tokens go behind its history, and its length grows by their count.

tokens [B, K+1] int64, of which row i keeps the first counts[i] [B] int64 (None: all); rows [B] int64 are device rows,
no two alike; history [R, width] and num_tokens [R] int64 are changed in place. What lies beyond a row's count is
scratch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import power_of_2, tl, triton
from specserve_kernels.launch import relaunched

MIN_BLOCK = 16  # tokens a row: up to 15 drafts compile once


def commit_tokens_ref(
    history: Tensor, num_tokens: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor | None
) -> Tensor:
    lengths = num_tokens[rows]  # [B]
    if counts is None:
        counts = torch.full_like(rows, tokens.shape[1])
    columns = lengths.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)  # [B, K+1]
    history[rows.unsqueeze(1), columns] = tokens
    num_tokens[rows] = lengths + counts
    return torch.cat((counts.unsqueeze(1), tokens), dim=1)


@relaunched
@triton.jit(
    do_not_specialize=["stride", "num_columns"],
    do_not_specialize_on_alignment=["rows", "tokens", "counts", "packed"],
)
def _commit_kernel(
    history, num_tokens, rows, tokens, counts, packed, width, stride, num_columns,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = tl.load(rows + index)
    length = tl.load(num_tokens + row)
    count = tl.load(counts + index) if HAS_COUNTS else num_columns.to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    token = tl.load(tokens + index * stride + column, mask=inside)
    tl.store(history + row * width + length + column, token, mask=inside)
    tl.store(packed + index * (num_columns + 1) + 1 + column, token, mask=inside)
    tl.store(packed + index * (num_columns + 1), count)
    tl.store(num_tokens + row, length + count)


def commit_tokens_triton(
    history: Tensor, num_tokens: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor | None
) -> Tensor:
    batch, columns = tokens.shape
    packed = tokens.new_empty(batch, columns + 1)
    _commit_kernel[(batch,)](
        history, num_tokens, rows, tokens, counts, packed, history.shape[1], tokens.stride(0), columns,
        HAS_COUNTS=counts is not None, BLOCK=max(MIN_BLOCK, power_of_2(columns)), num_warps=1,
    )  # fmt: skip
    return packed


_IMPLEMENTATIONS = {"torch": commit_tokens_ref, "triton": commit_tokens_triton}


def commit_tokens(history: Tensor, num_tokens: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor | None) -> Tensor:
    """Append in place; returns [B, K+2] int64, each row's count and then its tokens: what the host wants to know."""
    assert tokens.shape[0] == rows.shape[0] and tokens.stride(1) == 1
    assert history.is_contiguous()
    return _IMPLEMENTATIONS[backend(tokens, _IMPLEMENTATIONS)](history, num_tokens, rows, tokens, counts)
