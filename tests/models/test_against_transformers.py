"""Logits equal transformers' on the same folder, however the texts are cut and mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specserve.loading import load_model
from specserve_kernels.tolerances import MODEL

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "heads of their own": ("Llama", {"num_key_value_heads": 4}),
    "one kv head": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "head_dim": ("Llama", {"head_dim": 6}),
    "attention bias": ("Llama", {"attention_bias": True}),
    "mlp bias": ("Llama", {"mlp_bias": True}),
    "sharded": ("Llama", {"shard_size": "8KB"}),
    "rope theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "rope linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "rope dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "rope llama3": ("Llama", {"rope_parameters": {**LLAMA3, **ORIGINAL, "rope_theta": 100.0}}),
    "rope yarn": ("Llama", {"rope_parameters": {**YARN, **ORIGINAL, "rope_theta": 1e4}}),
    "rope yarn untruncated": (
        "Llama", {"rope_parameters": {**YARN, **ORIGINAL, "rope_theta": 1e4, "truncate": False, "beta_fast": 8}},
    ),
    "rope yarn mscale": (
        "Llama", {"rope_parameters": {**YARN, **ORIGINAL, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.4}},
    ),
    "rope yarn attention factor": (
        "Llama", {"rope_parameters": {**YARN, **ORIGINAL, "rope_theta": 1e4, "attention_factor": 1.3}},
    ),
    "rope older names": ("Llama", {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, a window": ("Mistral", {"sliding_window": 7}),
    "mistral, the narrowest window": ("Mistral", {"sliding_window": 1}),
    "mistral, a window as long as a text": ("Mistral", {"sliding_window": 40}),
    "mistral, a window beyond the context": ("Mistral", {"sliding_window": 64}),
    "mistral, tied, wide heads": ("Mistral", {"sliding_window": 16, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, a window not used": ("Qwen2", {"sliding_window": 5, "max_window_layers": 0}),
    "qwen2, a window above": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen2, a window everywhere": ("Qwen2", {**WINDOW, "max_window_layers": 0}),
    "qwen2, a window nowhere": ("Qwen2", {**WINDOW, "max_window_layers": 2}),
    "qwen2, a window below": ("Qwen2", {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3, a window above": ("Qwen3", {**WINDOW, "max_window_layers": 1, "head_dim": 8}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 tied, wide heads": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3 attention bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}  # fmt: skip

WHOLE = [{0: 40}, {1: 27}, {2: 9}]
PIECES = [
    {0: 19, 1: 3},  # two prefill chunks
    {1: 17, 0: 1, 2: 5},  # chunk, decode and first chunk, in another order
    {0: 5, 1: 1, 2: 1},  # verification and decodes
    {0: 5, 1: 5},  # verifications
    {2: 3, 0: 10, 1: 1},
]


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, save: Any, paged: Any, texts: list[list[int]]) -> None:
    family, config = MODELS[name]
    saved = save(family, **config)
    model = load_model(str(saved.path))
    rtol, atol = MODEL[torch.float32]
    for steps in (WHOLE, PIECES):
        for text, logits in zip(texts, paged(model, texts).run(steps), strict=True):
            assert logits.shape == (len(text), model.spec.vocab_size)
            torch.testing.assert_close(logits, saved.logits(text), rtol=rtol, atol=atol)


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 8},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_close(family: str, dtype: str, save: Any, paged: Any, texts: list[list[int]]) -> None:
    saved = save(family, initializer_range=0.05, **FAMILIES[family])
    model = load_model(str(saved.path), dtype=dtype)
    rtol, atol = MODEL[model.spec.dtype]
    for text, logits in zip(texts, paged(model, texts).run(PIECES), strict=True):
        assert logits.dtype == model.spec.dtype
        torch.testing.assert_close(logits.float(), saved.logits(text), rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_pieces_equal_the_whole(family: str, save: Any, paged: Any, texts: list[list[int]]) -> None:
    model = load_model(str(save(family, **FAMILIES[family]).path), dtype="float64")
    rtol, atol = MODEL[torch.float64]
    decodes = [{0: 1, 1: 1, 2: 1}] * 9 + [{0: 1, 1: 1}] * 18 + [{0: 1}] * 13
    whole = paged(model, texts).run(WHOLE)
    for steps in (PIECES, decodes):
        for one, other in zip(paged(model, texts).run(steps), whole, strict=True):
            assert one.dtype == torch.float64
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
