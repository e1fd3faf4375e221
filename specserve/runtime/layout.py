"""StepLayout: where each token of a forward comes from, as index tensors that depend on host-known shapes alone.

Steady decoding repeats the same shapes for many steps, so the tensors are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepLayout:
    """B sequences of `query_lens` tokens laid one after another, T in all.

    `sequence` [T]: which sequence a token belongs to; `offset` [T]: its place therein. `uniform`: all of one length.
    """

    query_lens: tuple[int, ...]
    sequence: Tensor
    offset: Tensor


@lru_cache(maxsize=256)
def step_layout(query_lens: tuple[int, ...], device: torch.device) -> StepLayout:
    """The layout for these query lengths."""
    lens = torch.tensor(query_lens)
    sequence = torch.repeat_interleave(torch.arange(len(query_lens)), lens)
    offset = torch.arange(len(sequence)) - (lens.cumsum(0) - lens)[sequence]
    return StepLayout(query_lens, sequence.to(device), offset.to(device))


@lru_cache(maxsize=256)
def sample_index(
    query_lens: tuple[int, ...], samples: tuple[bool, ...], num_drafts: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Token indices [S * (K+1)] whose logits the S sampling rows need; None if that is every token in order.

    A row's last 1+k tokens are wanted; rows with fewer drafts than the maximum K repeat their last one.
    """
    width = max((k for k, wanted in zip(num_drafts, samples, strict=True) if wanted), default=0)
    index: list[int] = []
    end = 0
    for length, wanted, drafts in zip(query_lens, samples, num_drafts, strict=True):
        end += length
        if wanted:
            first = end - 1 - drafts
            index += [min(first + j, end - 1) for j in range(width + 1)]
    if index == list(range(sum(query_lens))):
        return None
    return torch.tensor(index, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """A host tuple of ints as an int64 tensor, kept for the next step that has the same."""
    return torch.tensor(values, dtype=torch.int64, device=device)
