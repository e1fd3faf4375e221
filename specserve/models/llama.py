"""Llama 1–3 and models saved in its architecture."""

from __future__ import annotations

from typing import Any

from specserve.models.builder import DecoderShape
from specserve.models.hf_config import require, rope_parameters


def shape(config: Any) -> DecoderShape:
    """DecoderShape of a LlamaConfig."""
    require(config, "hidden_act", "silu")
    return DecoderShape(
        intermediate_size=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        rope=rope_parameters(config),
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=bool(config.attention_bias),
        out_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
    )
