"""The logits processors in their order, which is vLLM's:

    bad_words, min_tokens, logit_bias, penalties | temperature, min_p, top_k and top_p

Those before the bar can change an argmax and apply to greedy rows too; the rest do nothing to them. Raw logprobs are
taken before all of them. To add one: a file with `is_active` and `apply`, and a line here.

A processor is exact per position: position j of Q sees the drafts before it as generated. It may leave no row without
a possible token, and must not change its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from specserve.sampling import bad_words, logit_bias, min_p, min_tokens, penalties, temperature, top_k_top_p
from specserve.sampling.batch import SamplingBatch
from specserve_kernels.sampling.selection import Truncated, truncate


class Processor(NamedTuple):
    """is_active(batch): whether any row uses it; apply(logits [B, Q, V], batch, drafts [B, D]) → [B, Q, V]."""

    name: str
    is_active: Callable[[SamplingBatch], bool]
    apply: Callable[[Tensor, SamplingBatch, Tensor], Tensor]


PROCESSORS = (
    Processor("bad_words", bad_words.is_active, bad_words.apply),
    Processor("min_tokens", min_tokens.is_active, min_tokens.apply),
    Processor("logit_bias", logit_bias.is_active, logit_bias.apply),
    Processor("penalties", penalties.is_active, penalties.apply),
    Processor("temperature", temperature.is_active, temperature.apply),
    Processor("min_p", min_p.is_active, min_p.apply),
    Processor("top_k_top_p", top_k_top_p.is_active, top_k_top_p.apply),
)


_LATE = (temperature.apply, top_k_top_p.apply)  # what `prepare` may leave to who reads the logits next


def process(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    """Raw logits → processed ones, whose softmax is what the request asked to sample from.

    logits [B, Q, V] of any float dtype; drafts [B, D] int64 with D ≥ Q − 1: the drafts after the row's known tokens
    (past a row's count: anything). The Q positions are the last of D + 1: verification has Q = D + 1, the draft model's
    own step after D drafts has Q = 1. float64 stays, all else becomes float32; the result may be the input itself.
    """
    return _apply(PROCESSORS, logits, batch, drafts)


def prepare(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Truncated:
    """As `process`, but nothing is copied that no other processor changes: the temperature, and what top_k and top_p
    leave, are numbers beside the logits. logits are dense in the vocabulary.
    """
    divisor = batch.divisor if batch.any_sampled else None  # of 1 where that is the temperature: no other kernels
    if any(processor.is_active(batch) for processor in PROCESSORS if processor.apply not in _LATE):
        logits, divisor = _apply(PROCESSORS[:-1], logits, batch, drafts), None
    if not top_k_top_p.is_active(batch):
        return Truncated(logits, divisor)
    return truncate(
        logits if logits.stride(-1) == 1 else logits.contiguous(), divisor, batch.top_k, batch.top_p,
        max_top_k=batch.max_top_k, any_top_p=batch.any_top_p, any_top_p_alone=batch.any_top_p_alone,
    )  # fmt: skip


def _apply(processors: tuple[Processor, ...], logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    assert drafts.shape[1] >= logits.shape[1] - 1
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    for processor in processors:
        if processor.is_active(batch):
            logits = processor.apply(logits, batch, drafts)
    return logits
