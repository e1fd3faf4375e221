"""Plain sampling: the next token of rows without drafts, which is verification with k = 0, from raw logits."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.processors import prepare
from specserve_kernels.sampling.tokens import greedy, sample_tokens


def sample(logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
    """Raw logits [B, 1, V] → tokens [B, 1] int64; positions [B] int64: the absolute positions of these tokens.

    Where no processor but temperature, top_k and top_p is in use the logits are only read, as they are.
    """
    prepared = prepare(logits, batch, positions.new_empty(logits.shape[0], 0))
    if not batch.any_sampled:
        return greedy(prepared.logits)
    return sample_tokens(prepared.logits, prepared.divisor, batch.seed, positions, batch.temperature, prepared.cut)
