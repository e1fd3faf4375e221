"""The bundled demo models load and keep their limits; the script that trained them still runs, at a tiny size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "specserve" / "demo"
ADAPTERS = ("adapters/sql", "adapters/javascript", "adapters/docs", "more/css")
TEXT = "héllo, wörld — 日本語 🎉\n\tdef f(x):\r\n        return x  # \x00 ∑\n  "


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize(("name", "least", "most"), [("target", 8e6, 12e6), ("draft", 0.5e6, 1.5e6)])
def test_models_load_at_their_size_and_in_float16(name: str, least: float, most: float) -> None:
    model = load(DEMO / name)
    assert least <= sum(parameter.numel() for parameter in model.parameters()) <= most
    assert model.config.tie_word_embeddings and model.config.max_position_embeddings == 1024
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    assert dtypes(DEMO / name / "model.safetensors") == {"F16"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_and_companions_load_and_change_the_logits(name: str) -> None:
    ids = torch.arange(40, 72)[None]
    for model_name, folder in (("target", DEMO / name), ("draft", DEMO / name / "draft")):
        with torch.no_grad():
            base = load(DEMO / model_name)(ids).logits
            adapted = PeftModel.from_pretrained(load(DEMO / model_name), str(folder))(ids).logits
        assert torch.isfinite(adapted).all() and not torch.allclose(base, adapted, atol=0.1)
        assert dtypes(folder / "adapter_model.safetensors") == {"F16"}
        assert len(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == 7


def test_tokenizer_round_trips_any_text_and_renders_chats() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "list all users"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|bos|><|system|>Be brief.<|end|><|user|>list all users<|end|><|assistant|>"
    assert len(tokenizer) == load(DEMO / "target").config.vocab_size == 4096


def test_draft_has_the_targets_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DEMO / "draft" / file).read_bytes() == (DEMO / "target" / file).read_bytes()


def test_bundle_is_small_and_names_no_absolute_path() -> None:
    files = [file for file in DEMO.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 30_000_000
    configs = [file for file in files if file.suffix == ".json" and file.name != "tokenizer.json"]
    assert configs and not any('": "/' in file.read_text() for file in configs)


@pytest.mark.slow
def test_every_stage_of_the_training_script_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_demo.py"), "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, timeout=600)
    for name in ("target", "draft"):
        load(tmp_path / name)
    for name in ADAPTERS:
        PeftModel.from_pretrained(load(tmp_path / "target"), str(tmp_path / name))
        PeftModel.from_pretrained(load(tmp_path / "draft"), str(tmp_path / name / "draft"))
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert all(f"## {title}" in card for title in ("Corpus", "Training", "Held-out loss", "Draft acceptance"))
