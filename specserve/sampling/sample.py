"""Plain sampling: the next token of rows without drafts, which is verification with k = 0, from raw logits."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.processors import only_temperature, process
from specserve_kernels.sampling.tokens import greedy, sample_tokens


def sample(logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
    """Raw logits [B, 1, V] → tokens [B, 1] int64; positions [B] int64: the absolute positions of these tokens.

    Where no processor but the temperature is in use the logits are read once, as they are.
    """
    divisor = batch.divisor if batch.any_temperature else None
    if not only_temperature(batch):
        logits, divisor = process(logits, batch, positions.new_empty(logits.shape[0], 0)), None
    if not batch.any_sampled:
        return greedy(logits)
    return sample_tokens(logits, divisor, batch.seed, positions, batch.temperature)
