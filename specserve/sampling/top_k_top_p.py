"""top_k: keep the k most probable tokens. top_p, after it: keep the fewest tokens whose mass is at least p (Holtzman
et al. 2020), the one that crosses p included. Among equal tokens the lower id counts as the more probable one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch

OFF = float("-inf")


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_top_k or batch.any_top_p


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    descending, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if batch.any_top_k:
        rank = torch.arange(logits.shape[-1], device=logits.device)
        descending = descending.masked_fill_(rank >= batch.top_k[:, None, None], OFF)
    if batch.any_top_p:
        probs = descending.softmax(-1)
        reached = probs.cumsum(-1).sub_(probs) >= batch.top_p[:, None, None]  # by the tokens before
        reached[..., 0] = False  # the first token stays, however small p
        descending = descending.masked_fill_(reached, OFF)
    return torch.empty_like(logits).scatter_(-1, tokens, descending)
