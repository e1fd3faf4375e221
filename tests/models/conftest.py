"""Tiny models in folders as transformers saves them, and a paged runner that feeds them in any pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specserve.layers.context import ForwardContext, LoraApplier
from specserve.models.decoder import Decoder
from specserve_kernels.attention.paged import AttentionMetadata

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # the default's logits are so small that any two models agree
}


@dataclass(frozen=True)
class Saved:
    """A folder and the transformers model that was saved there."""

    path: Path
    oracle: Any

    def logits(self, ids: list[int]) -> torch.Tensor:
        """transformers' logits of one text, [len(ids), vocab]."""
        with torch.inference_mode():
            return self.oracle(torch.tensor([ids])).logits[0]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Saved]:
    """save(family, shard_size=…, **config): a random model, all of whose tensors are random, norms and biases too."""

    def make(family: str = "Llama", shard_size: str = "1GB", **config: Any) -> Saved:
        settings = getattr(transformers, f"{family}Config")(**{**SIZES, **config})
        torch.manual_seed(0)
        oracle = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
        for name, parameter in oracle.named_parameters():
            if "norm" in name or "bias" in name:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
        oracle.save_pretrained(tmp_path, max_shard_size=shard_size)
        return Saved(tmp_path, oracle)

    return make


@dataclass
class PagedRunner:
    """Runs a model over several texts, any number of tokens of each a step, in shuffled blocks of 4."""

    model: Decoder
    texts: list[list[int]]
    lora: LoraApplier | None = None
    computed: list[int] = field(default_factory=list)
    block_size: int = 4

    def __post_init__(self) -> None:
        spec = self.model.spec
        width = -(-max(map(len, self.texts)) // self.block_size) + 1
        blocks = len(self.texts) * width + 1
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = order.view(len(self.texts), width)
        shape = (blocks * self.block_size, spec.num_kv_heads, spec.head_dim)
        self.caches = [
            (torch.zeros(shape, dtype=spec.dtype), torch.zeros(shape, dtype=spec.dtype)) for _ in range(spec.num_layers)
        ]
        self.computed = [0] * len(self.texts)

    @torch.inference_mode()
    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """Feed the next counts[text] tokens of each named text in one batch; their logits [n, vocab] by text."""
        tokens = [(text, self.computed[text] + j) for text, n in counts.items() for j in range(n)]
        rows, positions = torch.tensor(tokens).unbind(1)
        blocks = self.tables[rows, positions // self.block_size]
        bounds = tuple(min(self.computed[text] + n + 2, len(self.texts[text])) for text, n in counts.items())
        meta = AttentionMetadata(
            positions, blocks * self.block_size + positions % self.block_size, self.tables, torch.tensor(list(counts)),
            torch.tensor([0, *accumulate(counts.values())]), tuple(counts.values()), bounds, self.block_size,
        )  # fmt: skip
        ids = torch.tensor([self.texts[text][position] for text, position in tokens])
        hidden = self.model.forward(ids, ForwardContext(meta, self.caches, self.lora))
        for text, n in counts.items():
            self.computed[text] += n
        logits = self.model.compute_logits(hidden)
        return dict(zip(counts, logits.split(tuple(counts.values())), strict=True))

    def run(self, steps: list[dict[int, int]]) -> list[torch.Tensor]:
        """All steps; the logits of each text in order."""
        outputs: list[list[torch.Tensor]] = [[] for _ in self.texts]
        for counts in steps:
            for text, logits in self.step(counts).items():
                outputs[text].append(logits)
        return [torch.cat(parts) for parts in outputs]


@pytest.fixture
def paged() -> type[PagedRunner]:
    return PagedRunner


@pytest.fixture
def texts() -> list[list[int]]:
    """Three texts of token ids, 40, 27 and 9 long."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in (40, 27, 9)]


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
