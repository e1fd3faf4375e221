"""Mistral: Llama's block with a sliding window over the keys of every layer (v0.1) or of none (later versions).

Jiang et al. 2023, "Mistral 7B".
"""

from __future__ import annotations

from typing import Any

from specserve.models.builder import DecoderShape
from specserve.models.hf_config import layer_windows, require, rope_parameters


def shape(config: Any) -> DecoderShape:
    """DecoderShape of a MistralConfig."""
    require(config, "hidden_act", "silu")
    return DecoderShape(
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=rope_parameters(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        windows=layer_windows(config),
    )
