"""min_p: keep the tokens at least min_p times as probable as the most probable one (Nguyen et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_min_p


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    threshold = logits.amax(-1, keepdim=True) + batch.log_min_p[:, None, None]  # [B, Q, 1]
    return logits.masked_fill(logits < threshold, float("-inf"))
