"""A tiny Llama, PEFT adapters for it, and its linears as the forward pass merges them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
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


WriteAdapter = Callable[..., None]


@pytest.fixture(scope="session")
def write_adapter() -> WriteAdapter:
    """write_adapter(folder, seed, rank=…, width=…): a PEFT folder for layer 0's o_proj, written by hand.

    Its contents depend on the arguments alone; it takes 2 * rank * width values of memory.
    """

    def write(folder: Path, seed: int, rank: int = 2, width: int = HIDDEN) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        prefix = "base_model.model.model.layers.0.self_attn.o_proj"
        tensors = {
            f"{prefix}.lora_A.weight": torch.randn(rank, width, generator=generator),
            f"{prefix}.lora_B.weight": torch.randn(width, rank, generator=generator),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": r".*\.0\..*o_proj"}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return write
