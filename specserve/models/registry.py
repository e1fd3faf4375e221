"""Which file serves which architecture. A new family is its file and its line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from specserve.config import Quantization
from specserve.core.errors import ModelLoadError
from specserve.models import llama, mistral, qwen2, qwen3
from specserve.models.builder import DecoderShape, build
from specserve.models.decoder import Decoder
from specserve.models.hf_config import model_spec

FAMILIES: Mapping[str, Callable[[Any], DecoderShape]] = MappingProxyType(
    {
        "LlamaForCausalLM": llama.shape,
        "MistralForCausalLM": mistral.shape,
        "Qwen2ForCausalLM": qwen2.shape,
        "Qwen3ForCausalLM": qwen3.shape,
    }
)


def build_model(
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    eos_token_ids: tuple[int, ...] = (),
    quantization: Quantization = "none",
    adapter_ranks: int = 0,
) -> Decoder:
    """Allocate the model that a transformers config describes, with room for weights of that `quantization`, and for
    the A of adapter slots of `adapter_ranks` together.

    Raises ModelLoadError naming the architecture, quantisation or setting that is not supported.
    """
    architecture = next(iter(getattr(config, "architectures", None) or ()), None)
    family = FAMILIES.get(architecture or "")
    if family is None:
        raise ModelLoadError(
            f"Architecture {architecture or '(none named in config.json)'} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}."
        )
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        raise ModelLoadError(
            f"Quantised weights ({method or 'quantization_config'}) are not supported: name the model's own; "
            "--quantization fp8 or int8 quantises them while they are loaded."
        )
    spec = model_spec(config, dtype=dtype, eos_token_ids=eos_token_ids, quantization=quantization)
    return build(replace(spec, adapter_ranks=adapter_ranks), family(config), device)
