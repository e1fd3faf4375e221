"""What transformers and peft say: models with any number of adapters, scaled and summed, and their merged weights."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lawbook.mixes import Lora
from lawbook.zoo import Zoo


def peft_model(zoo: Zoo, lora: Lora, dtype: torch.dtype) -> torch.nn.Module:
    """The target with the adapters of `lora` active together, each with its scale; peft adds their products up."""
    model = AutoModelForCausalLM.from_pretrained(zoo.target, dtype=dtype).eval()
    if not lora:
        return model
    paths = zoo.adapters["near"]
    first, *others = lora
    model = PeftModel.from_pretrained(model, paths[first.name], adapter_name=first.name, autocast_adapter_dtype=False)
    for ref in others:
        model.load_adapter(paths[ref.name], adapter_name=ref.name, autocast_adapter_dtype=False)
    model.base_model.set_adapter([ref.name for ref in lora])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for ref in lora:
                if ref.name in module.scaling:  # it may leave this linear alone
                    module.scaling[ref.name] *= ref.scale
    return model.to(dtype).eval()


def save_merged(zoo: Zoo, lora: Lora, folder: Path) -> Path:
    """A plain float64 model with the adapters merged into its weights, as transformers writes it."""
    model = peft_model(zoo, lora, torch.float64)
    merged = model.merge_and_unload(adapter_names=[ref.name for ref in lora]) if lora else model
    merged.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits_of(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Logits [len(answer), vocab] that each token of the answer was chosen from, in one forward over the whole text."""
    ids = torch.tensor([prompt + answer])
    logits: Tensor = model(input_ids=ids).logits[0]
    return logits[len(prompt) - 1 : -1]
