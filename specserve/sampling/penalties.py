"""Repetition, frequency and presence penalties, in this order, as in vLLM.

repetition r (Keskar et al. 2019): tokens of prompt or output: logit / r if positive, logit · r if not
frequency f and presence s (OpenAI): − f · (times in the output) − s · (in the output)
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve.sampling.counts import output_counts_at


def is_active(batch: SamplingBatch) -> bool:
    return batch.any_penalty


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    assert batch.counts is not None, "penalties need with_history()"
    output = output_counts_at(batch.counts, drafts, logits.shape[1])  # [B, Q or 1, V]
    in_output = output > 0
    seen = in_output | batch.counts.prompt.unsqueeze(1)
    penalty = batch.repetition_penalty[:, None, None]
    repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(seen, repeated, logits)
    logits = logits - batch.frequency_penalty[:, None, None] * output
    return logits - batch.presence_penalty[:, None, None] * in_output
