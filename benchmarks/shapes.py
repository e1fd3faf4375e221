"""Sizes of the benchmark's models, and what a pair on disk is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama. 8b and 1b are those of Llama 3.1 and 3.2, untied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int = 128256

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name in a layer → (fan_in, fan_out)."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, query),
            "self_attn.k_proj": (self.hidden, kv),
            "self_attn.v_proj": (self.hidden, kv),
            "self_attn.o_proj": (query, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights that every token is multiplied with: all layers' linears and the output head."""
        return self.layers * sum(i * o for i, o in self.linears.values()) + self.hidden * self.vocab

    def lora_weights(self, rank: int) -> int:
        """Weights of one LoRA of that rank on all linears."""
        return rank * self.layers * sum(i + o for i, o in self.linears.values())

    @property
    def kv_values(self) -> int:
        """Cached values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def config(self, dtype: str) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "torch_dtype": dtype,
            "vocab_size": self.vocab, "hidden_size": self.hidden, "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "attention_bias": False, "mlp_bias": False, **special_tokens(self.vocab),
        }  # fmt: skip


SHAPES = {
    "8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128),
    "3b": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, head_dim=128),
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64),
    "tiny": Shape(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=2048),
}


@dataclass(frozen=True, slots=True)
class PairSettings:
    """What a pair is made of; written beside it as pair.json."""

    target: str = "8b"
    draft: str = "1b"
    alpha: float = 0.8
    eps: float = 0.02
    layers: int | None = None  # of both models; None: each shape's own
    adapters: int = 8
    ranks: tuple[int, ...] = (16,)  # of the adapters, in turn
    companions: bool = False
    seed: int = 1
    dtype: str = "bfloat16"

    def shape(self, role: str) -> Shape:
        """The shape of "target" or "draft"."""
        shape = SHAPES[self.target if role == "target" else self.draft]
        return shape if self.layers is None else replace(shape, layers=self.layers)


def load_settings(pair: Path) -> PairSettings:
    """The settings of a pair on disk."""
    content = json.loads((pair / "pair.json").read_text())
    return PairSettings(**content | {"ranks": tuple(content["ranks"])})


def special_tokens(vocab: int) -> dict[str, int]:
    return {"bos_token_id": vocab - 256, "eos_token_id": vocab - 255}
