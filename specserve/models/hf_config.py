"""Reading a transformers config: what every family takes from it in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from specserve.config import Quantization
from specserve.core.errors import ModelLoadError
from specserve.models.spec import ModelSpec


def model_spec(
    config: Any, *, dtype: torch.dtype, eos_token_ids: tuple[int, ...], quantization: Quantization = "none"
) -> ModelSpec:
    """Sizes of a transformers config in its usual names."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise ModelLoadError(f"The config's {heads} attention heads cannot share {kv_heads} key-value heads evenly.")
    return ModelSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_model_len=config.max_position_embeddings,
        eos_token_ids=eos_token_ids,
        dtype=dtype,
        quantization=quantization,
    )


def rope_parameters(config: Any) -> Mapping[str, Any]:
    """The config's rope settings in one mapping, from transformers 5's `rope_parameters` or older names."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = rope.get("rope_theta", getattr(config, "rope_theta", None))
    rope["rope_theta"] = 10000.0 if theta is None else theta
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    rope.setdefault("original_max_position_embeddings", original)
    return rope


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, None where a layer sees the whole context; () where all do.

    With a window w, position p sees keys at p - w < j <= p, as in transformers. `layer_types` names the layers that
    have one; without it all do. A window as long as the context hides nothing.
    """
    window = config.sliding_window
    everywhere = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or everywhere
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ModelLoadError(
            f"The config's layer_types name {unknown[0]!r}; supported are 'full_attention' and 'sliding_attention'."
        )
    if "sliding_attention" not in kinds:
        return ()
    if window is None or window < 1:
        raise ModelLoadError(f"The config's sliding_window is {window!r}; sliding attention needs at least 1.")
    if window >= config.max_position_embeddings:
        return ()
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def require(config: Any, field: str, *supported: Any) -> None:
    """Reject a config whose `field` is set to what the family file does not compute."""
    value = getattr(config, field, None)
    if value is not None and value not in supported:
        wanted = " or ".join(map(repr, supported))
        raise ModelLoadError(f"The config's {field} is {value!r}; supported is {wanted}.")
