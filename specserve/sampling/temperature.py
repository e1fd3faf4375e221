"""temperature: logits divided by it. Greedy rows (temperature 0) are divided by 1: only their argmax counts."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_temperature


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    return logits / batch.divisor[:, None, None]
