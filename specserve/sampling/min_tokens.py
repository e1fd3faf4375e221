"""min_tokens: EOS and stop tokens are impossible until a row has generated min_tokens tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.sparse import add_sparse


def is_active(batch: SamplingBatch) -> bool:
    return batch.forbidden is not None


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    """Position j chooses token number output_len + j (from 0); the drafts before it are output too."""
    forbidden, output_len = batch.forbidden, batch.output_len
    assert forbidden is not None and output_len is not None, "min_tokens needs with_history()"
    last = drafts.shape[1]
    step = torch.arange(last + 1 - logits.shape[1], last + 1, device=logits.device)  # [Q]
    missing = (batch.min_tokens - output_len)[forbidden.row]  # [N]
    too_early = step < missing[:, None]  # [N, Q]
    return add_sparse(logits, forbidden, torch.where(too_early, forbidden.value[:, None], 0.0))
