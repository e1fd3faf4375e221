"""Two proposers as one: the second drafts where the first found nothing, or goes on from what it found."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specserve.speculation.proposer import Continuing, DraftBatch, Drafts, Proposer


class CombinedProposer:
    """Named after its parts, `ngram+draft_model`. A second part that is `Continuing` fills every row up to its number
    of drafts; another drafts for the rows that have none.

    Both parts run for all rows: which row got what is known on the device alone. It may depend on the committed tokens,
    never on the drafts themselves, so q stays what each draft was drawn from.
    """

    def __init__(self, first: Proposer, second: Proposer) -> None:
        assert not first.keeps_kv, f"{first.name} drafts for every row, so nothing is left for {second.name}"
        assert not second.keeps_kv or isinstance(second, Continuing), f"the KV of {second.name} would miss drafts"
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.location: Literal["device", "host"] = "host" if "host" in (first.location, second.location) else "device"
        self.keeps_kv = second.keeps_kv

    def propose(self, batch: DraftBatch) -> Drafts:
        first = self.first.propose(batch)
        if isinstance(self.second, Continuing):
            return self.second.continue_from(batch, first)
        return choose(first, self.second.propose(batch), batch.sampling.vocab_size)


def choose(first: Drafts, second: Drafts, vocab_size: int) -> Drafts:
    """Row by row `first` where it has drafts, else `second`; both of B rows and the same width."""
    found = first.counts > 0  # [B]
    tokens = torch.where(found[:, None], first.tokens, second.tokens)
    counts = torch.where(found, first.counts, second.counts)
    probs = [drafts.written_out() for drafts in (first, second)]
    having = next((one for one in probs if one is not None), None)
    if having is None:
        return Drafts(tokens, counts)
    first_probs, second_probs = (
        _one_hot(drafts.tokens, having.dtype, vocab_size) if one is None else one
        for drafts, one in zip((first, second), probs, strict=True)
    )
    return Drafts(tokens, counts, torch.where(found[:, None, None], first_probs, second_probs))


def _one_hot(tokens: Tensor, dtype: torch.dtype, vocab_size: int) -> Tensor:
    """What tokens [B, K] were drawn from by a proposer that is sure of them: [B, K, vocab]."""
    hot = torch.zeros(*tokens.shape, vocab_size, dtype=dtype, device=tokens.device)
    return hot.scatter_(2, tokens.unsqueeze(2), 1.0)
