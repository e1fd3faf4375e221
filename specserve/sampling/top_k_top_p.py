"""top_k and, of what it leaves, top_p: see specserve_kernels.selection."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve_kernels.sampling.selection import top_k_top_p


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_top_k or batch.any_top_p


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    return top_k_top_p(
        logits, batch.top_k, batch.top_p,
        max_top_k=batch.max_top_k, any_top_p=batch.any_top_p, any_top_p_alone=batch.any_top_p_alone,
    )  # fmt: skip
