"""A small model drafts one token after another (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.processors import prepare
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve_kernels.sampling.cut import DraftSoftmax
from specserve_kernels.sampling.drawn import Kept, draw_draft_token, new_kept, new_probs


def draw_draft(
    logits: Tensor,
    sampling: SamplingBatch,
    drafted: Tensor,
    position: Tensor,
    kept: Kept | None,
    num_drafts: int,
    *,
    in_full: bool = False,
) -> tuple[Tensor, Kept | None]:
    """The next draft of each row from logits [B, vocab], drawn exactly as verification expects: (tokens [B], kept).

    The draft's distribution gets the same processors as the target's; `drafted` [B, D], the drafts so far, count as
    generated. `position` [B]: the absolute position of the token drawn. `kept`: what this call returned for the draft
    before; it holds what each of `num_drafts` was drawn from, None where no row's method asks; as probabilities if
    `in_full`.
    """
    source = prepare(logits.unsqueeze(1), sampling, drafted)  # [B, 1, vocab]
    if kept is None and sampling.any_rejection:
        kept = (new_probs if in_full else new_kept)(source, num_drafts)
    token = draw_draft_token(
        source, sampling.seed, position, sampling.temperature, sampling.is_coupled, kept, drafted.shape[1],
        any_coupled=sampling.any_coupled, any_rejection=sampling.any_rejection,
    )  # fmt: skip
    return token, kept


def keep_given(given: Drafts, step: int, token: Tensor, kept: Kept | None) -> Tensor:
    """Draft `step` [B] of each row: what is given, else `token`. `kept` holds what `token` was drawn from at this step,
    and then what the answer was.

    A given draft without probabilities is one-hot where others have some. The given ones have them only if there is a
    `kept`: whether there are any is decided by the rows' methods.
    """
    was_given = step < given.counts  # [B]
    token = torch.where(was_given, given.tokens[:, step], token)
    if isinstance(kept, DraftSoftmax):
        total = kept.cut.total[:, step]
        total.copy_(torch.where(was_given, 0.0, total))
    elif kept is not None:
        q, probs = kept[:, step], given.written_out()  # [B, vocab], [B, K, vocab]
        own = torch.zeros_like(q).scatter_(1, token.unsqueeze(1), 1.0) if probs is None else probs[:, step]
        q.copy_(torch.where(was_given.unsqueeze(1), own, q))
    return token


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
        kept: Kept | None = None
        last = batch.num_tokens - 1  # [B]
        positions = torch.stack((last - 1, last), dim=1).clamp_(min=0)  # [B, 2]; a one-token row computes it twice
        in_full = given is not None and given.probs is not None  # what was given follows from no logits
        for step in range(batch.max_drafts):
            logits = batch.forward(positions)  # [B, vocab]
            position = batch.num_tokens + step  # [B]
            token, kept = draw_draft(
                logits, sampling, tokens[:, :step], position, kept, batch.max_drafts, in_full=in_full
            )
            if given is not None:
                token = keep_given(given, step, token, kept)
            batch.history[batch.rows, position] = token
            tokens[:, step] = token
            positions = position.unsqueeze(1)  # [B, 1]
        return Drafts(tokens, batch.limits, kept)
