"""Prompt-lookup drafting: what followed the last time that the newest n tokens stood together (Saxena 2023).

A device op over the rows' token history: no host work, no model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specserve.speculation.proposer import DraftBatch, Drafts

MAX_NGRAM = 3
MIN_NGRAM = 1


class NgramProposer:
    """Drafts the continuation of the latest earlier match of the longest suffix of MAX_NGRAM … MIN_NGRAM tokens."""

    name = "ngram"
    location: Literal["device", "host"] = "device"
    keeps_kv = False

    def propose(self, batch: DraftBatch) -> Drafts:
        tokens, counts = ngram_lookup(batch.history[batch.rows], batch.num_tokens, batch.max_drafts)
        return Drafts(tokens, torch.minimum(counts, batch.limits))


def ngram_lookup(history: Tensor, num_tokens: Tensor, max_drafts: int) -> tuple[Tensor, Tensor]:
    """history [B, L] int64, num_tokens [B] int64 → (tokens [B, max_drafts], counts [B]); counts 0 where none matches.

    A match ending at index e (inclusive) proposes history[e+1 …]; longer n-grams win over later matches.
    """
    length = history.shape[1]
    index = torch.arange(length, device=history.device)  # [L]
    last = num_tokens.unsqueeze(1) - 1  # [B, 1]
    run = torch.ones_like(history, dtype=torch.bool)  # [B, L]: the n tokens ending here equal the newest n
    best = torch.zeros_like(history)  # [B, L]: longest such n, 0 for none
    for n in range(MAX_NGRAM):
        suffix_token = history.gather(1, (last - n).clamp_(min=0))  # [B, 1]
        shifted = torch.roll(history, n, dims=1)
        run = run & (shifted == suffix_token) & (index >= n) & (last >= n)
        if n + 1 >= MIN_NGRAM:
            best = torch.where(run, n + 1, best)
    best = torch.where(index < last, best, 0)  # a match must have a known continuation
    score = best * length + index  # longest first, then latest
    score = torch.where(best > 0, score, -1)
    top, end = score.max(dim=1)  # [B]
    offsets = torch.arange(1, max_drafts + 1, device=history.device)  # [K]
    source = end.unsqueeze(1) + offsets  # [B, K]
    tokens = history.gather(1, source.clamp_(max=length - 1))
    counts = torch.where(top >= 0, num_tokens - 1 - end, 0).clamp_(max=max_drafts)
    return tokens, counts
