"""What the rest of the engine relies on: the spec, the linears and their adapter seam, the ranks' seam."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from specserve.layers.context import ForwardContext
from specserve.loading import load_model
from specserve_kernels.attention.paged import AttentionMetadata
from specserve_kernels.lora.batch import LoraProduct
from specserve_kernels.tolerances import MODEL

PARTS = (
    (("self_attn.q_proj", 32), ("self_attn.k_proj", 16), ("self_attn.v_proj", 16)),
    (("self_attn.o_proj", 32),),
    (("mlp.gate_proj", 44), ("mlp.up_proj", 44)),
    (("mlp.down_proj", 32),),
)


def test_spec_and_linears(save: Any) -> None:
    model = load_model(str(save().path))
    spec = model.spec
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers, spec.num_heads) == (61, 32, 2, 4)
    assert (spec.num_kv_heads, spec.head_dim, spec.max_model_len, spec.dtype) == (2, 8, 64, torch.float32)
    assert [linear.lora_index for linear in model.linears] == list(range(8))
    assert [linear.spec.parts for linear in model.linears] == [*PARTS, *PARTS]
    assert [linear.spec.layer for linear in model.linears] == [0] * 4 + [1] * 4
    assert [linear.spec.in_features for linear in model.linears[:4]] == [32, 32, 32, 44]
    assert model.linears[4].spec.keys[1] == (1, "self_attn.k_proj", None)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [5, 6]}, (5, 6)), ({"eos_token_id": 7}, (7,)), ({}, (3,)), (None, (3,))],
)
def test_eos_token_ids(generation: dict[str, Any] | None, expected: tuple[int, ...], save: Any) -> None:
    path = save(eos_token_id=3).path
    (path / "generation_config.json").unlink()
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    assert load_model(str(path)).spec.eos_token_ids == expected


@dataclass
class Merged:
    """Adapters as one dense change of each linear: y += x deltaᵀ."""

    deltas: list[torch.Tensor] = field(default_factory=list)

    def update(self, linear_index: int, x: torch.Tensor) -> LoraProduct:
        return LoraProduct(self.apply, linear_index, x)

    def apply(self, linear_index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        y += x @ self.deltas[linear_index].T


def test_every_linear_takes_its_adapter(save: Any, paged: Any, texts: list[list[int]]) -> None:
    """A change given to the seam equals the same change made to the weights that transformers computes with."""
    saved = save()
    model = load_model(str(saved.path))
    generator = torch.Generator().manual_seed(3)
    lora = Merged()
    for linear in model.linears:
        spec = linear.spec
        delta = 0.1 * torch.randn(spec.out_features, spec.in_features, generator=generator)
        lora.deltas.append(delta)
        for (name, _), part in zip(spec.parts, delta.split([width for _, width in spec.parts]), strict=True):
            saved.oracle.get_submodule(f"model.layers.{spec.layer}.{name}").weight.data += part
    rtol, atol = MODEL[torch.float32]
    for text, logits in zip(texts, paged(model, texts, lora).run([{0: 40}, {1: 20, 2: 9}, {1: 7}]), strict=True):
        torch.testing.assert_close(logits, saved.logits(text), rtol=rtol, atol=atol)


class Halves:
    """Two ranks that hold half of every product each: their sum is twice one's share."""

    size = 2

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_ranks_sum_the_branches_and_not_the_residual(save: Any, texts: list[list[int]]) -> None:
    model = load_model(str(save().path), dtype="float64")
    halved = load_model(str(save().path), dtype="float64")
    for name, parameter in halved.parameters.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.destination.mul_(0.5)
    ids = torch.tensor(texts[2])
    positions = torch.arange(len(ids))

    def hidden(of: Any, **ranks: Any) -> torch.Tensor:
        caches = [(torch.zeros(32, 2, 8).double(), torch.zeros(32, 2, 8).double()) for _ in range(2)]
        meta = AttentionMetadata(
            positions, positions + 16, torch.tensor([[1]]), torch.tensor([0]), torch.tensor([0, len(ids)]), (len(ids),),
            (len(ids),), 16,
        )  # fmt: skip
        return of.forward(ids, ForwardContext(meta, caches, **ranks))

    torch.testing.assert_close(hidden(halved, communicator=Halves()), hidden(model), rtol=1e-12, atol=1e-12)


def test_tied_embeddings_share_one_tensor(save: Any) -> None:
    model = load_model(str(save(tie_word_embeddings=True).path))
    assert model.head is model.embedding
    assert "lm_head.weight" not in model.parameters
