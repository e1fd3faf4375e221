"""Tiny random models and adapters, written as transformers and peft write them.

Weights are drawn wide enough that next-token distributions are far from uniform and each adapter changes what is said:
with the customary 0.02 every law would compare near-ties, and an ignored adapter would go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 61
MARKOV_VOCAB = 12
EOS = 2
DRAFTS = ("near", "narrow", "self")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# Every linear, several ranks, per-module ranks and alphas, rank-stabilised scaling, some layers only.
ADAPTERS = {
    "a0": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "a1": {"r": 8, "lora_alpha": 8, "target_modules": ATTENTION + MLP},
    "a2": {"r": 3, "lora_alpha": 3, "target_modules": MLP, "use_rslora": True},
    "a3": {
        "r": 6,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 9},
    },
    "a4": {"r": 1, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj"], "layers_to_transform": [1]},
    "a5": {"r": 12, "lora_alpha": 12, "target_modules": ["k_proj", "up_proj", "down_proj"]},
}
WINDOW = 11  # shorter than most texts of the laws, and no multiple of a block
WITH_COMPANION = ("a0", "a1", "a2", "a3")


@dataclass(frozen=True)
class Zoo:
    """Folders of one family: the target, drafts by name, and for each draft the adapters with companions for it."""

    target: Path
    drafts: dict[str, Path]
    adapters: dict[str, dict[str, Path]]


def _config(family: str, **sizes: int) -> PretrainedConfig:
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": None,
    } | sizes
    if family == "qwen3":
        return Qwen3Config(**shape, tie_word_embeddings=True)
    if family == "qwen2":  # the second of two layers has a window; it has no head_dim of its own
        shape["num_attention_heads"] = shape["hidden_size"] // shape.pop("head_dim")
        window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
        return Qwen2Config(**shape, **window, tie_word_embeddings=True)
    if family == "mistral":
        return MistralConfig(**shape, sliding_window=WINDOW, tie_word_embeddings=False)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return LlamaConfig(**shape, rope_parameters=rope, tie_word_embeddings=False)


def _model(family: str, seed: int, **sizes: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers leaves them zero
                parameter.normal_(std=0.3)
    return model


def _perturbed(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A draft that often agrees with the target, not always: its weights are the target's plus noise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.015)
    return model


def _forgetful(model: torch.nn.Module) -> torch.nn.Module:
    """Attention adds nothing, so the next token depends on the last one alone."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def _save_adapter(base: Path, name: str, seed: int, folder: Path) -> None:
    """peft initialises B to zero, which is no adapter at all; here it is drawn."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**ADAPTERS[name]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.35)
    model.save_pretrained(folder)


def build_zoo(family: str, root: Path) -> Zoo:
    """Write a family's models and adapters under `root`; the same bytes each time."""
    folders = {name: root / family / name for name in ("target", "near", "narrow")}
    _model(family, 1).save_pretrained(folders["target"])
    _perturbed(_model(family, 1), 2).save_pretrained(folders["near"])
    _model(family, 3, hidden_size=16, num_hidden_layers=1, num_key_value_heads=1).save_pretrained(folders["narrow"])
    drafts = {"near": folders["near"], "narrow": folders["narrow"], "self": folders["target"]}
    adapters: dict[str, dict[str, Path]] = {}
    for draft, draft_folder in drafts.items():
        adapters[draft] = {name: root / family / "adapters" / draft / name for name in ADAPTERS}
        for seed, (name, folder) in enumerate(adapters[draft].items(), start=10):
            _save_adapter(folders["target"], name, seed, folder)
            if draft == "self":  # the very same adapter, to agree everywhere
                _save_adapter(draft_folder, name, seed, folder / "draft")
            elif name in WITH_COMPANION:
                _save_adapter(draft_folder, name, seed + 100, folder / "draft")
    return Zoo(folders["target"], drafts, adapters)


def build_markov_zoo(root: Path, vocab_size: int = MARKOV_VOCAB) -> Zoo:
    """A target without memory, a draft that resembles it, and adapter a2 (of the MLP alone) with its companion."""
    target, near, adapter = root / "target", root / "near", root / "a2"
    _forgetful(_model("llama", 1, vocab_size=vocab_size)).save_pretrained(target)
    _forgetful(_perturbed(_model("llama", 1, vocab_size=vocab_size), 2)).save_pretrained(near)
    _save_adapter(target, "a2", 12, adapter)
    _save_adapter(near, "a2", 112, adapter / "draft")
    return Zoo(target, {"near": near}, {"near": {"a2": adapter}})
