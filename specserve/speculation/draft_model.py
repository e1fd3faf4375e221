"""A small model drafts one token after another (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.processors import only_temperature, process
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve_kernels.sampling.tokens import draft_sample, greedy


def draw_draft(
    logits: Tensor, sampling: SamplingBatch, drafted: Tensor, position: Tensor
) -> tuple[Tensor, Tensor | None]:
    """One draft a row from logits [B, vocab], drawn exactly as verification expects: (tokens [B], q [B, vocab] | None).

    The draft's distribution gets the same processors as the target's; `drafted` [B, D], the drafts so far, count as
    generated. `position` [B]: the absolute position of the token drawn.
    """
    if not sampling.any_sampled and only_temperature(sampling):
        return greedy(logits), None  # of the raw ones, where nothing is done to them: they are not copied
    processed = process(logits.unsqueeze(1), sampling, drafted).squeeze(1)  # [B, vocab]
    return draft_sample(
        processed, sampling.seed, position, sampling.temperature, sampling.is_coupled,
        any_coupled=sampling.any_coupled, any_rejection=sampling.any_rejection,
    )  # fmt: skip


def keep_given(given: Drafts, step: int, token: Tensor, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Draft `step` [B] of each row, and what it was drawn from [B, vocab]: what is given, else `token` and `q`.

    A given draft without probabilities is one-hot where others have some. The given ones have them only if `q` has:
    whether there are any is decided by the rows' methods.
    """
    kept = step < given.counts  # [B]
    token = torch.where(kept, given.tokens[:, step], token)
    if q is None:
        return token, None
    own = torch.zeros_like(q).scatter_(1, token.unsqueeze(1), 1.0) if given.probs is None else given.probs[:, step]
    return token, torch.where(kept.unsqueeze(1), own, q)


class DraftModelProposer:
    """k passes of the draft model over the rows' history.

    The first pass reads the last two committed tokens: after a round in which all k drafts were accepted the draft
    has not seen the last one yet, and rewriting a token's KV is harmless, so every row has the same shape.
    """

    name = "draft_model"
    location: Literal["device", "host"] = "device"
    keeps_kv = True

    def propose(self, batch: DraftBatch) -> Drafts:
        return self._draft(batch, None)

    def continue_from(self, batch: DraftBatch, given: Drafts) -> Drafts:
        """The passes read the given drafts as they would their own, so that the draft's KV holds what is verified."""
        return self._draft(batch, given)

    def _draft(self, batch: DraftBatch, given: Drafts | None) -> Drafts:
        assert batch.forward is not None, "the engine offers draft_model only with a draft model"
        sampling = batch.sampling.with_history(batch.lengths, batch.history)
        tokens = batch.num_tokens.new_empty(len(batch.num_drafts), batch.max_drafts)  # [B, K]
        probs: list[Tensor] = []
        last = batch.num_tokens - 1  # [B]
        positions = torch.stack((last - 1, last), dim=1).clamp_(min=0)  # [B, 2]; a one-token row computes it twice
        for step in range(batch.max_drafts):
            logits = batch.forward(positions)  # [B, vocab]
            position = batch.num_tokens + step  # [B]
            token, q = draw_draft(logits, sampling, tokens[:, :step], position)
            if given is not None:
                token, q = keep_given(given, step, token, q)
            batch.history[batch.rows, position] = token
            tokens[:, step] = token
            if q is not None:
                probs.append(q)
            positions = position.unsqueeze(1)  # [B, 1]
        return Drafts(tokens, batch.limits, torch.stack(probs, dim=1) if probs else None)
