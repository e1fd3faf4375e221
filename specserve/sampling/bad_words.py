"""bad_words: a token that would complete one of a row's forbidden token sequences is impossible.

Only what was generated counts, the drafts before a position included; a word that begins in the prompt is not seen, as
in vLLM.
"""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve_kernels.sampling.bad_words import forbid_words


def is_active(batch: SamplingBatch) -> bool:
    return batch.bad_words is not None


def apply(logits: Tensor, batch: SamplingBatch, drafts: Tensor) -> Tensor:
    words, history, length = batch.bad_words, batch.history, batch.length
    assert words is not None and history is not None and length is not None, "bad_words need with_history()"
    return forbid_words(logits, drafts, words.tokens, words.row, history, batch.device_rows, batch.prompt_len, length)
