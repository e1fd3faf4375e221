"""Write models and adapters as float16 folders, and read them back exactly as a server will."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .settings import TARGET_MODULES


def save_model(model: LlamaForCausalLM, tokenizer: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer and float16 weights; the weights go last: they mean "done".

    The tokenizer's files are copied from its folder: target and draft must share them to the byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = model.config
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.float16
    config.save_pretrained(folder)
    state = {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    state.pop("lm_head.weight", None)  # tied to the embeddings
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: Path, device: str) -> LlamaForCausalLM:
    """Load the stored float16 weights for float32 arithmetic."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def new_adapter(model: LlamaForCausalLM, rank: int, rslora: bool) -> PeftModel:
    """Put a fresh LoRA on all seven linears of `model`; the base weights are frozen."""
    alpha = 16 if rslora else 2 * rank  # rsLoRA divides by sqrt(rank), not by rank
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def save_adapter(model: PeftModel, folder: Path, base: str) -> None:
    """Write a PEFT folder with float16 weights. `base` is the base model's name as the configuration states it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")
    state = {name: tensor.half().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model_folder: Path, adapter: Path | None, device: str) -> torch.nn.Module:
    """Load a stored model, and on it a stored adapter if one is given."""
    model = load_model(model_folder, device)
    adapted: torch.nn.Module = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    return adapted.to(device).eval()
