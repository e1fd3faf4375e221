"""Token embeddings and the output head: one matrix [vocab, hidden] each, or one for both when they are tied."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specserve.layers.storage import Parameter, whole
from specserve_kernels.gather import gather_rows
from specserve_kernels.skinny.linear import arrivals, is_skinny, skinny_linear


class Head(Protocol):
    """What makes logits of hidden states."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, vocab], in the model's dtype."""


class VocabMatrix:
    """[vocab, hidden], read by row (embedding) or multiplied (logits). Adapters do not touch it."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)
        self._transposed = self._weight.t()
        self._arrivals = arrivals(device)

    def parameters(self) -> dict[str, Parameter]:
        return {"weight": whole(self._weight)}

    def embed(self, ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden]."""
        return gather_rows(self._weight, ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] → [N, vocab], in the model's dtype."""
        if is_skinny(hidden):
            return skinny_linear(hidden, self._weight, arrivals=self._arrivals)
        return torch.mm(hidden, self._transposed)
