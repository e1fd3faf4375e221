"""logit_bias: a constant added to single tokens' logits (OpenAI's meaning), at every position alike."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.sparse import add_sparse


def is_active(batch: SamplingBatch) -> bool:
    return batch.logit_bias is not None


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    assert batch.logit_bias is not None
    return add_sparse(logits, batch.logit_bias, batch.logit_bias.value[:, None])
