"""top_k: keep the k most probable tokens. top_p, after it: keep the fewest tokens whose mass is at least p (Holtzman
et al. 2020), the one that crosses p included. Among equal tokens the lower id counts as the more probable one.

Sorting a vocabulary is the dearest thing that sampling could do, and the answer is nearly always among the few most
probable tokens: these are taken by selection, and all are sorted only where the few are not enough. Whether they are
is known on the host for top_k; for top_p alone it depends on the logits, so a GPU, which would have to wait for the
answer and sorts well, sorts. Only the number of tokens kept and the least of them is needed, no order of token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch

NUM_CANDIDATES = 256


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_top_k or batch.any_top_p


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    total = logits.logsumexp(-1, keepdim=True)
    few_may_do = batch.max_top_k <= NUM_CANDIDATES and not (batch.any_top_p_alone and logits.is_cuda)
    if few_may_do and logits.shape[-1] > NUM_CANDIDATES:
        descending = logits.topk(NUM_CANDIDATES, dim=-1).values
        mass = (descending - total).exp_().cumsum(-1)  # [B, Q, candidates]
        if not batch.any_top_p_alone or _is_reached(mass, batch):
            return _keep(logits, descending, _num_kept(mass, batch), batch)
    descending = logits.sort(dim=-1, descending=True).values
    mass = (descending - total).exp_().cumsum(-1)  # [B, Q, V]
    return _keep(logits, descending, _num_kept(mass, batch), batch)


def _has_top_k(batch: SamplingBatch) -> Tensor:
    return batch.top_k < batch.vocab_size  # [B]


def _is_reached(mass: Tensor, batch: SamplingBatch) -> bool:
    """Whether the candidates' mass reaches p at every position of every row that has top_p and no top_k."""
    needs_nothing = _has_top_k(batch) | batch.top_p.isinf()
    return bool(((mass[..., -1] >= batch.top_p[:, None]) | needs_nothing[:, None]).all())


def _num_kept(mass: Tensor, batch: SamplingBatch) -> Tensor:
    """How many tokens stay, from the cumulated mass of the descending ones: [B, Q, C] → [B, Q, 1] int64, at most C."""
    kept = batch.top_k.clamp(max=mass.shape[-1])[:, None, None].expand(-1, mass.shape[1], 1)
    if not batch.any_top_p:
        return kept
    needed = batch.top_p[:, None, None].expand_as(kept)
    if batch.any_top_k:  # top_p is of what top_k left; without top_k that is all, and 1
        left = torch.where(_has_top_k(batch)[:, None, None], mass.gather(-1, kept - 1), 1.0)
        needed = needed * left
    # a token stays if those before it are not enough
    return torch.minimum(kept, (mass[..., :-1] < needed).sum(-1, keepdim=True) + 1)


def _keep(logits: Tensor, descending: Tensor, kept: Tensor, batch: SamplingBatch) -> Tensor:
    """Mask all but the `kept` [B, Q, 1] largest, of equal ones those of lower id; rows with neither setting stay."""
    least = descending.gather(-1, kept - 1)
    room = (kept - (descending > least).sum(-1, keepdim=True)).int()  # for tokens equal to the least
    equal = logits == least
    off = (~_has_top_k(batch) & batch.top_p.isinf())[:, None, None]
    keep = (logits > least).logical_or_(equal.logical_and_(equal.cumsum(-1, dtype=torch.int32) <= room))
    return logits.masked_fill(keep.logical_or_(off).logical_not_(), float("-inf"))
