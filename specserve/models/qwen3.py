"""Qwen3 (dense): Llama's block with queries and keys normed per head; upper layers may have a window."""

from __future__ import annotations

from typing import Any

from specserve.models.builder import DecoderShape
from specserve.models.hf_config import layer_windows, require, rope_parameters


def shape(config: Any) -> DecoderShape:
    """DecoderShape of a Qwen3Config."""
    require(config, "hidden_act", "silu")
    return DecoderShape(
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=rope_parameters(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=bool(config.attention_bias),
        out_bias=bool(config.attention_bias),
        head_norm=True,
        windows=layer_windows(config),
    )
