"""Qwen3 (dense): Llama's block with queries and keys normed per head."""

from __future__ import annotations

from typing import Any

from specserve.models.builder import DecoderShape
from specserve.models.hf_config import require, rope_parameters


def shape(config: Any) -> DecoderShape:
    """DecoderShape of a Qwen3Config."""
    require(config, "hidden_act", "silu")
    require(config, "use_sliding_window", False)
    return DecoderShape(
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=rope_parameters(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        attention_bias=bool(config.attention_bias),
        head_norm=True,
    )
