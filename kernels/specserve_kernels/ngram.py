"""Prompt lookup: what followed the last time that a row's newest tokens stood together (Saxena 2023).

For row r = rows[b] of n = num_tokens[r] tokens h = history[r], find the end e < n - 1 of an earlier run of tokens equal
to the newest m, with m as long as possible from `max_ngram` down to `min_ngram`, and then e as large as possible:

    tokens[b, j] = h[e + 1 + j],   counts[b] = min(limits[b], n - 1 - e),   both 0 without a match and past the count

history [R, width], num_tokens [R], rows and limits [B] are int64, and so are tokens [B, K] and counts [B]. No row's
limit may exceed K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import power_of_2, tl, triton
from specserve_kernels.launch import relaunched

BLOCK = 1024
MIN_COLUMNS = 16  # drafts a row that compile once


def ngram_lookup_ref(
    history: Tensor, num_tokens: Tensor, rows: Tensor, limits: Tensor, max_drafts: int, min_ngram: int, max_ngram: int
) -> tuple[Tensor, Tensor]:
    text = history[rows]  # [B, width]
    length = text.shape[1]
    index = torch.arange(length, device=text.device)
    last = num_tokens[rows].unsqueeze(1) - 1  # [B, 1]
    run = torch.ones_like(text, dtype=torch.bool)  # [B, width]: the m tokens ending here equal the newest m
    longest = torch.zeros_like(text)  # [B, width]: the largest such m, 0 for none
    for m in range(1, max_ngram + 1):
        newest = text.gather(1, (last - m + 1).clamp_(min=0))  # [B, 1]
        run = run & (torch.roll(text, m - 1, dims=1) == newest) & (index >= m - 1) & (last >= m - 1)
        if m >= min_ngram:
            longest = torch.where(run, m, longest)
    longest = torch.where(index < last, longest, 0)  # a match must have a known continuation
    score = torch.where(longest > 0, longest * length + index, 0)  # longest first, then latest
    best = score.amax(dim=1)  # [B]
    end = best % length
    counts = torch.where(best > 0, torch.minimum(limits, last.squeeze(1) - end), 0)
    steps = torch.arange(max_drafts, device=text.device)
    tokens = text.gather(1, (end.unsqueeze(1) + 1 + steps).clamp_(max=length - 1))
    return tokens.where(steps < counts.unsqueeze(1), 0), counts


@relaunched
@triton.jit(do_not_specialize=["num_drafts"], do_not_specialize_on_alignment=["tokens", "counts", "rows", "limits"])
def _ngram_kernel(
    tokens, counts, history, num_tokens, rows, limits, width, num_drafts,
    MIN_NGRAM: tl.constexpr, MAX_NGRAM: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program b: row rows[b], as much of it as is known."""
    index = tl.program_id(0)
    row = tl.load(rows + index)
    text = history + row * width
    last = tl.load(num_tokens + row) - 1
    best = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(0, last, BLOCK):
        end = start + tl.arange(0, BLOCK)
        run = end < last
        longest = tl.zeros((BLOCK,), dtype=tl.int64)
        for m in tl.static_range(1, MAX_NGRAM + 1):
            newest = tl.load(text + last - (m - 1), mask=last >= m - 1, other=-1)
            token = tl.load(text + end - (m - 1), mask=run & (end >= m - 1), other=-2)
            run = run & (token == newest)
            if m >= MIN_NGRAM:
                longest = tl.where(run, m, longest)
        best = tl.maximum(best, tl.where(longest > 0, longest * width + end, 0))
    found = tl.max(best, axis=0)
    after = found % width + 1
    count = tl.where(found > 0, tl.minimum(tl.load(limits + index), last - after + 1), 0)
    column = tl.arange(0, COLUMNS)
    token = tl.load(text + after + column, mask=column < count, other=0)
    tl.store(tokens + index * num_drafts + column, token, mask=column < num_drafts)
    tl.store(counts + index, count)


def ngram_lookup_triton(
    history: Tensor, num_tokens: Tensor, rows: Tensor, limits: Tensor, max_drafts: int, min_ngram: int, max_ngram: int
) -> tuple[Tensor, Tensor]:
    tokens = history.new_empty(rows.shape[0], max_drafts)
    counts = history.new_empty(rows.shape[0])
    _ngram_kernel[(rows.shape[0],)](
        tokens, counts, history, num_tokens, rows, limits, history.shape[1], max_drafts,
        MIN_NGRAM=min_ngram, MAX_NGRAM=max_ngram, BLOCK=BLOCK, COLUMNS=max(MIN_COLUMNS, power_of_2(max_drafts)),
        num_warps=8,
    )  # fmt: skip
    return tokens, counts


_IMPLEMENTATIONS = {"torch": ngram_lookup_ref, "triton": ngram_lookup_triton}


def ngram_lookup(
    history: Tensor,
    num_tokens: Tensor,
    rows: Tensor,
    limits: Tensor,
    max_drafts: int,
    *,
    min_ngram: int,
    max_ngram: int,
) -> tuple[Tensor, Tensor]:
    """(tokens [B, max_drafts], counts [B]); on a GPU the work grows with a row's true length, not with the width."""
    assert history.is_contiguous() and rows.is_contiguous() and limits.is_contiguous()
    assert 1 <= min_ngram <= max_ngram
    implementation = _IMPLEMENTATIONS[backend(history, _IMPLEMENTATIONS)]
    return implementation(history, num_tokens, rows, limits, max_drafts, min_ngram, max_ngram)
