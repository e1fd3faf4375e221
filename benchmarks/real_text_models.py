"""The benchmark's models, trained from nothing on the corpus: a target, a draft, an adapter for each domain.

The stages are those of examples/demo_training at other sizes. Each writes files and is skipped where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from demo_training import store, tokens
from demo_training.data import Mixture, Windows
from demo_training.settings import Budget, Settings, llama
from demo_training.training import distillation_loss, fit, next_token_loss
from transformers import LlamaForCausalLM

from benchmarks.real_text_corpus import BASE_DOMAINS

OTHERS_SHARE = 0.02  # of the base model's training windows, for each adapter's domain: a taste
ENGLISH_SHARE = 0.08
HARD = 0.5  # of the draft's loss: the cross-entropy on the teacher's likeliest token


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets; seconds are shares of all the time there is."""

    window: int
    vocab_size: int
    target: dict[str, int]
    draft: dict[str, int]
    rank: int
    rows: int  # windows a step, of target and draft
    adapter_rows: int
    steps: int  # at most, of any training: the tiny run's limit
    corpus: float  # of the text that is read
    samples: int  # texts that a companion is distilled from
    distill_steps: int
    distill_batch: int
    prompts: int  # measured, for each domain
    prompt_tokens: int
    new_tokens: int
    # What is left of all the time is for text, companions and measuring.
    target_share: float = 0.30
    draft_share: float = 0.10
    adapter_share: float = 0.12  # of each: on a GPU they are trained at once


GPU = Scale(
    window=1024, vocab_size=8192,
    target={
        "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 2816,
    },
    draft={
        "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "intermediate_size": 1408,
    },
    rank=16, rows=32, adapter_rows=16, steps=100_000, corpus=1.0, samples=1024, distill_steps=400, distill_batch=32,
    prompts=32, prompt_tokens=128, new_tokens=192,
)  # fmt: skip
TINY = Scale(
    window=128, vocab_size=512,
    target={
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 96,
    },
    draft={
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
        "intermediate_size": 64,
    },
    rank=4, rows=8, adapter_rows=4, steps=40, corpus=0.06, samples=8, distill_steps=5, distill_batch=4,
    prompts=3, prompt_tokens=16, new_tokens=16,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where things are, how large, and how long they may take."""

    work: Path
    scale: Scale
    device: str
    seconds: float

    @property
    def target(self) -> Path:
        return self.work / "target"

    @property
    def draft(self) -> Path:
        return self.work / "draft"

    def adapter(self, domain: str) -> Path:
        return self.work / "adapters" / domain

    @cached_property
    def windows(self) -> Windows:
        """The token arrays; first asked for once they are written."""
        return Windows(self.work / "tokens.npz", self.device)

    def domains(self) -> list[str]:
        """The adapters' domains, by name."""
        arrays = self.windows.arrays
        found = [name.split(".")[0] for name in arrays if name.endswith(".text.held_out")]
        return sorted(name for name in found if name not in BASE_DOMAINS and f"{name}.text.train" in arrays)

    def budget(self, share: float, rows: int, rate: float) -> Budget:
        return Budget(self.scale.steps, share * self.seconds, rows, rate, warmup=max(2, min(60, self.scale.steps // 8)))


def train_target(run: Run) -> None:
    """Next tokens of mostly Python, some English and a taste of each domain."""
    if (run.target / "model.safetensors").exists():
        return
    model = _new_model(run, run.scale.target, seed=0)
    if run.device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)  # one compiled block serves all layers
    budget = run.budget(run.scale.target_share, run.scale.rows, 1e-3)
    fit(model, _batches(run, base_mixture(run), budget.rows), next_token_loss(model), budget, "target")
    store.save_model(model, run.work / "tokenizer", run.target)


def train_draft(run: Run) -> None:
    """The draft learns the target's distributions on the same text."""
    if (run.draft / "model.safetensors").exists():
        return
    target = store.load_model(run.target, run.device).requires_grad_(False)
    draft = _new_model(run, run.scale.draft, seed=2)
    budget = run.budget(run.scale.draft_share, run.scale.rows, 3e-3)
    fit(draft, _batches(run, base_mixture(run), budget.rows), distillation_loss(draft, target, HARD), budget, "draft")
    store.save_model(draft, run.work / "tokenizer", run.draft)


def train_adapter(run: Run, domain: str) -> None:
    """Next tokens of one domain."""
    if (run.adapter(domain) / "adapter_model.safetensors").exists():
        return
    torch.manual_seed(4)
    model = store.new_adapter(store.load_model(run.target, run.device), run.scale.rank, False).train()
    budget = run.budget(run.scale.adapter_share, run.scale.adapter_rows, 1e-3)
    batches = _batches(run, {f"{domain}.text": 1.0}, budget.rows)
    fit(model, batches, next_token_loss(model), budget, domain, decay=0.01)
    store.save_adapter(model, run.adapter(domain), "real-text-target")


def base_mixture(run: Run) -> Mixture:
    """Shares of the base model's windows."""
    others = {f"{domain}.text": OTHERS_SHARE for domain in run.domains()}
    rest = 1.0 - sum(others.values()) - ENGLISH_SHARE
    return {"python.text": rest, "english.text": ENGLISH_SHARE} | others


def _new_model(run: Run, sizes: dict[str, int], seed: int) -> LlamaForCausalLM:
    tokenizer = store.load_tokenizer(run.work / "tokenizer")
    names = {"pad": tokens.PAD, "bos": tokens.BOS, "eos": tokens.EOS, "end": tokens.END}
    ids = {key: int(tokenizer.convert_tokens_to_ids(name)) for key, name in names.items()}
    torch.manual_seed(seed)
    settings = Settings(window=run.scale.window, vocab_size=run.scale.vocab_size)
    return LlamaForCausalLM(llama(sizes, settings, ids)).to(run.device)


def _batches(run: Run, mixture: Mixture, rows: int) -> Iterator[torch.Tensor]:
    windows, generator = run.windows, torch.Generator().manual_seed(1)
    while True:
        yield windows.random(mixture, rows, run.scale.window + 1, generator)
