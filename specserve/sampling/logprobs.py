"""Log-probabilities under the target's raw distribution: before any processor, as in vLLM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Logprobs(NamedTuple):
    """chosen [..] of the tokens asked for; top_values [.., N] and top_tokens [.., N] int64, most likely first."""

    chosen: Tensor
    top_values: Tensor
    top_tokens: Tensor


def logprobs(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Of raw logits [.., V] (any float dtype; float64 stays, all else is computed in float32) and tokens [..] int64."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).sub_(total).squeeze(-1)
    top_values, top_tokens = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    return Logprobs(chosen, top_values.sub_(total), top_tokens)
