"""A tiny Llama, PEFT adapters for it, and its linears as the forward pass merges them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from specserve_adapters.spec import LinearSpec

MakeAdapter = Callable[..., PeftModel]
HIDDEN, INTERMEDIATE, KV, LAYERS = 32, 48, 16, 2


@pytest.fixture(scope="session")
def specs() -> list[LinearSpec]:
    """The tiny model's linears: qkv and gate_up merged, o and down alone."""
    out: list[LinearSpec] = []
    for layer in range(LAYERS):
        out += [
            LinearSpec(
                layer, HIDDEN, (("self_attn.q_proj", HIDDEN), ("self_attn.k_proj", KV), ("self_attn.v_proj", KV))
            ),
            LinearSpec(layer, HIDDEN, (("self_attn.o_proj", HIDDEN),)),
            LinearSpec(layer, HIDDEN, (("mlp.gate_proj", INTERMEDIATE), ("mlp.up_proj", INTERMEDIATE))),
            LinearSpec(layer, INTERMEDIATE, (("mlp.down_proj", HIDDEN),)),
        ]
    return out


@pytest.fixture
def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


@pytest.fixture
def make_adapter(base_model: LlamaForCausalLM) -> MakeAdapter:
    """make_adapter(folder, seed=…, **LoraConfig settings) → the PEFT model whose adapter was saved there, B ≠ 0."""

    def make(folder: Path, *, seed: int = 0, **settings: Any) -> PeftModel:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **settings})
        model = get_peft_model(copy.deepcopy(base_model), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3)
        model.save_pretrained(str(folder))
        return model

    return make
