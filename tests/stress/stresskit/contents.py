"""What adapter folders hold: families of LoRA as peft writes them, drawn anew for every variant, or nothing good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lawbook.zoo import ADAPTERS, ATTENTION, MLP, Zoo
from specserve_adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME, hash_adapter

BROKEN = "broken"
VARIANTS = 5
MAX_RANK = 8
FAMILIES: dict[str, dict[str, object]] = {
    **{name: ADAPTERS[name] for name in ("a0", "a1", "a2", "a3", "a4")},
    "b2": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True},
    "b5": {"r": 5, "lora_alpha": 4, "target_modules": MLP},
    "b8": {"r": MAX_RANK, "lora_alpha": 3, "target_modules": ["k_proj", *MLP], "use_rslora": True},
    "c1": {"r": 1, "lora_alpha": 2, "target_modules": ATTENTION, "layers_to_transform": [0]},
}
CONTENTS = tuple(f"{family}-{variant}" for family in FAMILIES for variant in range(VARIANTS))
BREAKAGES = ("truncated", "config", "nan", "missing", "shape", "companion")


class Library:
    """A folder for each content, written when it is first asked for; the same bytes in every run. Two variants of three
    have a companion for the draft model."""

    def __init__(self, zoo: Zoo, root: Path) -> None:
        self._root = root
        self._bases = {"": zoo.target, "draft": zoo.drafts["near"]}
        self._templates: dict[str, Path] = {}
        self._folders: dict[str, Path] = {}

    def folder(self, content: str) -> Path:
        if content not in self._folders:
            family, variant = content.split("-")
            seed = CONTENTS.index(content)
            folder = self._root / content
            _redraw(self._template(family, ""), folder, seed)
            if int(variant) % 3 != 2:
                _redraw(self._template(family, "draft"), folder / "draft", seed + len(CONTENTS))
            self._folders[content] = folder
        return self._folders[content]

    def _template(self, family: str, part: str) -> Path:
        folder = self._root / "templates" / family / part
        if not (folder / WEIGHTS_NAME).exists():
            base = AutoModelForCausalLM.from_pretrained(self._bases[part])
            get_peft_model(base, LoraConfig(**FAMILIES[family])).save_pretrained(folder)
        return folder


def _redraw(template: Path, folder: Path, seed: int) -> None:
    """As peft wrote it, but for B: peft's is zero, which is no adapter at all."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(template / WEIGHTS_NAME)
    for key, tensor in tensors.items():
        std = 0.35 if "lora_B" in key else tensor.std().item()
        tensors[key] = torch.randn(tensor.shape, generator=generator) * std
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copy(template / CONFIG_NAME, folder / CONFIG_NAME)


def same_family(one: str, other: str) -> bool:
    """Whether their configs are equal, so that exchanging the target's weights makes one of the other."""
    return one.partition("-")[0] == other.partition("-")[0]


def install(source: Path, folder: Path, *, weights_only: bool = False) -> str:
    """Put a content into a served folder: its version from now on.

    `weights_only` exchanges the target's weights in one atomic step: whoever reads meanwhile gets one or the other.
    The companion, which changes no token, is then the former one's.
    """
    if weights_only:
        _exchange(folder / WEIGHTS_NAME, (source / WEIGHTS_NAME).read_bytes())
    else:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
    draft = folder / "draft"
    return hash_adapter(folder, draft if draft.is_dir() else None)


def spoil(folder: Path, how: str) -> None:
    """Make a served folder one that must be refused. "truncated" is one atomic step."""
    weights = folder / WEIGHTS_NAME
    if how == "companion" and (folder / "draft").is_dir():
        (folder / "draft" / WEIGHTS_NAME).write_bytes(b"no weights")
    elif how == "config":
        (folder / CONFIG_NAME).write_text("{")
    elif how == "missing":
        weights.unlink(missing_ok=True)
    elif how in ("nan", "shape") and (tensors := _readable(weights)):
        key = max(tensors)
        tensors[key] = tensors[key] * torch.nan if how == "nan" else tensors[key][:-1]
        save_file(tensors, weights)
    else:
        _exchange(weights, weights.read_bytes()[:-5] if weights.exists() else b"")


def _readable(weights: Path) -> dict[str, torch.Tensor]:
    try:
        return {key: tensor.clone() for key, tensor in load_file(weights).items()}
    except Exception:  # it was spoilt before
        return {}


def _exchange(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)
