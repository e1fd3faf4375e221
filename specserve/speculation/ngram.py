"""Prompt-lookup drafting: what followed the last time that the newest n tokens stood together (Saxena 2023).

A device op over the rows' token history: no host work, no model.
"""

from __future__ import annotations

from typing import Literal

from specserve.speculation.proposer import DraftBatch, Drafts
from specserve_kernels.ngram import ngram_lookup

MAX_NGRAM = 3
MIN_NGRAM = 1


class NgramProposer:
    """Drafts the continuation of the latest earlier match of the longest suffix of MAX_NGRAM … MIN_NGRAM tokens."""

    name = "ngram"
    location: Literal["device", "host"] = "device"
    keeps_kv = False

    def propose(self, batch: DraftBatch) -> Drafts:
        tokens, counts = ngram_lookup(
            batch.history, batch.lengths, batch.rows, batch.limits, batch.max_drafts,
            min_ngram=MIN_NGRAM, max_ngram=MAX_NGRAM,
        )  # fmt: skip
        return Drafts(tokens, counts)
