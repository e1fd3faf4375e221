"""Drafts drawn one step after another, and what each was drawn from, kept for `rejection.verify`.

The reference keeps probabilities [B, K, vocab]. On the GPU the draft's logits are kept as the model gave them, with a
few numbers a draft (`cut.py`): nothing is normalised, and what is written is no wider than what is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.sampling.cut import DraftSoftmax
from specserve_kernels.sampling.drafting import draw_kept, new_softmax
from specserve_kernels.sampling.selection import Truncated
from specserve_kernels.sampling.tokens import draft_sample, greedy, sample_tokens

Kept = Tensor | DraftSoftmax


def new_probs(first: Truncated, num_drafts: int) -> Tensor:
    """Memory for the probabilities [B, K, vocab] of K drafts a row whose first is drawn from `first` [B, 1, vocab]."""
    num_rows, _, vocab_size = first.logits.shape
    dtype = torch.float64 if first.logits.dtype == torch.float64 else torch.float32
    return first.logits.new_empty((num_rows, num_drafts, vocab_size), dtype=dtype)


def _new_softmax(first: Truncated, num_drafts: int) -> DraftSoftmax:
    return new_softmax(first.logits[:, 0], first.divisor, num_drafts)


_NEW: dict[str, Callable[[Truncated, int], Kept]] = {"torch": new_probs, "triton": _new_softmax}


def new_kept(first: Truncated, num_drafts: int) -> Kept:
    """As `new_probs`, in whatever form suits the device."""
    return _NEW[backend(first.logits, _NEW)](first, num_drafts)


def draw_draft_token(
    source: Truncated,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    kept: Kept | None,
    step: int,
    *,
    any_coupled: bool,
    any_rejection: bool,
) -> Tensor:
    """Draft `step` of each row, with the noise that `rejection.verify` expects of its method.

    source [B, 1, vocab]: the draft's logits; the rest as in `tokens.draft_sample`. What the draft was drawn from goes
    into `kept`, which must be given where any_rejection is true. Returns tokens [B] int64.
    """
    if not (any_coupled or any_rejection):
        return greedy(source.logits)[:, 0]
    if not any_rejection:
        return sample_tokens(source.logits, source.divisor, seed, position, temperature, source.cut)[:, 0]
    assert kept is not None, "a rejection row's draft cannot be verified without what it was drawn from"
    if isinstance(kept, DraftSoftmax):
        return draw_kept(source.logits[:, 0], source.cut, seed, position, temperature, is_coupled, kept, step)
    tokens, q = draft_sample(source.processed()[:, 0], seed, position, temperature, is_coupled)
    assert q is not None
    kept[:, step] = q
    return tokens
