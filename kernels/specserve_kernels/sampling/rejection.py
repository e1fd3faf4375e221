"""Verification of drafts: one round of speculative decoding for a batch of rows, exact in distribution.

Position j (0 ≤ j ≤ K) predicts the token at absolute position first_position + j after drafts d_0 … d_{j−1}; p_j is the
softmax of its processed logits, q_j what d_j was drawn from. A row commits its accepted drafts and one token more.

Greedy (temperature 0) and coupled rows: the target draws t_j itself, by argmax, or by Gumbel-max with the SAMPLE noise
of that absolute position, and d_j is accepted while d_j = t_j. What comes out is t_0 … t_a: the target's own sample,
whatever the drafts. (Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding", 2024: a draft drawn with the same noise is accepted with probability ≥ (1 − TV) / (1 + TV).)

Rejection rows: d_j is accepted if u_j · q_j(d_j) < p_j(d_j), else the token is drawn from the normalised
(p_j − q_j)₊; after the last draft, from p (Leviathan, Kalman, Matias, "Fast inference from transformers via speculative
decoding", 2023; Chen et al. 2023). A draft is accepted with probability 1 − TV(p, q), the largest possible. A proposer
without a distribution is q = 1 at d_j. Rows without drafts sample as coupled rows do.

Shapes: B rows, K ≥ 0 drafts, V vocabulary; float64 stays float64, all else float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.sampling.cut import Cut, DraftSoftmax, cut_logits
from specserve_kernels.sampling.random import Stream, uniform
from specserve_kernels.sampling.tokens import divided, gumbel_argmax, sample
from specserve_kernels.sampling.verification import verify_triton as run_verification


class Verified(NamedTuple):
    """tokens [B, K+1] int64; the first num_tokens [B] = num_accepted [B] + 1 are committed, the rest is junk."""

    tokens: Tensor
    num_tokens: Tensor
    num_accepted: Tensor


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values [B, N, V], index [B] → [B, V]."""
    rows = torch.arange(0, values.shape[0] * values.shape[1], values.shape[1], device=index.device)
    return values.flatten(0, 1).index_select(0, rows + index)


def _accepts(p: Tensor, drafts: Tensor, draft_probs: Tensor | None, seed: Tensor, positions: Tensor) -> Tensor:
    """u · q(d) < p(d), in float64: there u < 1 makes it certain where p = q. [B, K, V], [B, K] → [B, K] bool."""
    threshold = uniform(seed[:, None], positions, Stream.ACCEPT)
    if draft_probs is not None:
        threshold = threshold * draft_probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
    return threshold < p.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)


def residual_logits(p: Tensor, q: Tensor) -> Tensor:
    """log (p − q)₊, not normalised: p, q [B, V] → [B, V].

    Where p ≤ q everywhere a rejection is rounding error (p = q up to it), and p itself is the answer.
    """
    residual = p - q
    residual = torch.where(residual.amax(-1, keepdim=True) > 0, residual, p)
    # the logarithm of zero is right but slow on CPUs
    return residual.clamp(min=torch.finfo(p.dtype).tiny).log_().masked_fill_(residual <= 0, float("-inf"))


def _rejection_tail(
    processed: Tensor, p: Tensor, drafts: Tensor, draft_probs: Tensor | None, accepted: Tensor, rejected: Tensor
) -> Tensor:
    """Logits [B, V] of the token after the accepted drafts: of the residual after a rejection, else the target's."""
    index = accepted.clamp(max=p.shape[1] - 1)  # of a draft: after the last one nothing was rejected
    p_at = _at(p, index)
    if draft_probs is None:
        q_at = torch.zeros_like(p_at).scatter_(1, drafts.gather(1, index[:, None]), 1.0)
    else:
        q_at = _at(draft_probs, index)
    return torch.where(rejected[:, None], residual_logits(p_at, q_at), _at(processed, accepted))


def verify_ref(
    processed: Tensor,
    drafts: Tensor,
    draft_counts: Tensor,
    draft_probs: Tensor | DraftSoftmax | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    divisor: Tensor | None = None,
    cut: Cut | None = None,
    *,
    any_coupled: bool = True,
    any_rejection: bool = True,
) -> Verified:
    """`verify` in torch."""
    if cut is None:
        processed = divided(processed, None if divisor is None else divisor[:, None])
    else:
        processed = cut_logits(processed, divisor, cut)
    if isinstance(draft_probs, DraftSoftmax):
        draft_probs = draft_probs.probs(drafts.clamp(0, processed.shape[-1] - 1))
    num_drafts = drafts.shape[1]
    steps = torch.arange(num_drafts + 1, device=drafts.device)
    valid = steps[:num_drafts] < draft_counts[:, None]  # [B, K]
    if num_drafts == 0:  # plain sampling, in either method
        any_coupled, any_rejection = any_coupled or any_rejection, False
    if any_coupled:
        tokens = sample(processed, seed, first_position[:, None] + steps, temperature)
    else:
        tokens = processed.argmax(-1)
    accept = drafts == tokens[:, :num_drafts]
    if not any_rejection:
        accepted = (accept & valid).cumprod(1).sum(1)
        return Verified(tokens, accepted + 1, accepted)

    is_rejection = ~is_coupled & (temperature > 0)  # [B]
    drafts = drafts.where(valid, 0)  # what is past a row's count may be no token id at all
    p = processed[:, :num_drafts].softmax(-1)
    accepts = _accepts(p, drafts, draft_probs, seed, first_position[:, None] + steps[:num_drafts])
    accept = torch.where(is_rejection[:, None], accepts, accept)
    accepted = (accept & valid).cumprod(1).sum(1)

    rejected = accepted < draft_counts
    tail = _rejection_tail(processed, p, drafts, draft_probs, accepted, rejected)
    stream = torch.where(rejected, Stream.RESIDUAL, Stream.SAMPLE)
    last = gumbel_argmax(tail, seed, first_position + accepted, temperature, stream)[:, None]
    own = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, accepted[:, None], last)  # [B, K+1]
    return Verified(torch.where(is_rejection[:, None], own, tokens), accepted + 1, accepted)


def verify_triton(
    processed: Tensor,
    drafts: Tensor,
    draft_counts: Tensor,
    draft_probs: Tensor | DraftSoftmax | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    divisor: Tensor | None = None,
    cut: Cut | None = None,
    *,
    any_coupled: bool = True,
    any_rejection: bool = True,
) -> Verified:
    """`verify` by the kernels of verification.py."""
    rows = (seed.contiguous(), first_position.contiguous(), temperature.contiguous(), is_coupled.contiguous())
    return Verified(
        *run_verification(
            processed, drafts.contiguous(), draft_counts.contiguous(),
            draft_probs.contiguous() if isinstance(draft_probs, Tensor) else draft_probs,
            *rows, None if divisor is None else divisor.contiguous(), cut, any_coupled, any_rejection,
        )
    )  # fmt: skip


_IMPLEMENTATIONS = {"torch": verify_ref, "triton": verify_triton}


def verify(
    processed: Tensor,
    drafts: Tensor,
    draft_counts: Tensor,
    draft_probs: Tensor | DraftSoftmax | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    divisor: Tensor | None = None,
    cut: Cut | None = None,
    *,
    any_coupled: bool = True,
    any_rejection: bool = True,
) -> Verified:
    """Verify up to K drafts a row; with K = 0 this is plain sampling.

    processed [B, K+1, V]: the target's processed logits, dense in V; of any float dtype. drafts [B, K] int64;
    draft_counts [B] int64: a row's drafts from there on are ignored, whatever they hold. draft_probs [B, K, V]: the
    processed softmax that each draft was drawn from (one-hot for a row whose proposer has none), or None: all one-hot;
    a DraftSoftmax says the same by the draft's logits.
    seed, first_position [B] int64: the absolute position of the token that position 0 predicts; temperature [B], 0:
    greedy; is_coupled [B] bool. divisor [B], or None: what the logits are still to be divided by (the temperature, 1
    where greedy), and cut, or None: what top_k and top_p then leave, for rows that need no other processing.
    any_coupled, any_rejection: host knowledge, whether any row of temperature > 0 uses that method; False saves work.
    """
    assert processed.shape[:2] == (drafts.shape[0], drafts.shape[1] + 1), "logits must have a position more than drafts"
    assert not isinstance(draft_probs, Tensor) or draft_probs.shape == (*drafts.shape, processed.shape[2])
    assert processed.stride(-1) == 1, "the vocabulary must be dense"
    return _IMPLEMENTATIONS[backend(processed, _IMPLEMENTATIONS)](
        processed, drafts, draft_counts, draft_probs, seed, first_position, temperature, is_coupled, divisor, cut,
        any_coupled=any_coupled, any_rejection=any_rejection,
    )  # fmt: skip
