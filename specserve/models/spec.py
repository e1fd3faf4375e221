"""What the rest of the engine must know about a loaded model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specserve.config import Quantization


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of one model. `max_model_len` is in tokens; `eos_token_ids` may be empty."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    quantization: Quantization = "none"  # of the linears and the head
    adapter_ranks: int = 0  # of all adapter slots together, for which linears may keep room behind their weights
