"""Qwen2 and Qwen2.5 (dense): Llama's block with biases on queries, keys and values; upper layers may have a window.

Yang et al. 2024, "Qwen2 Technical Report".
"""

from __future__ import annotations

from typing import Any

from specserve.models.builder import DecoderShape
from specserve.models.hf_config import layer_windows, require, rope_parameters


def shape(config: Any) -> DecoderShape:
    """DecoderShape of a Qwen2Config."""
    require(config, "hidden_act", "silu")
    return DecoderShape(
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=rope_parameters(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=True,
        windows=layer_windows(config),
    )
