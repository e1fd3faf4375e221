"""Builds a Decoder from its sizes: allocates the layers and names their checkpoint tensors as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from specserve.layers.attention import Attention
from specserve.layers.embedding import Head, VocabMatrix
from specserve.layers.linear import Linear
from specserve.layers.mlp import GatedMLP
from specserve.layers.norm import HeadNorm, RMSNorm
from specserve.layers.quantised import QuantisedHead
from specserve.layers.rotary import Rotary
from specserve.layers.storage import Parameter
from specserve.layers.storages import STORAGES
from specserve.models.decoder import Block, Decoder
from specserve.models.spec import ModelSpec
from specserve_adapters.spec import LinearSpec


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What tells one pre-norm decoder from another besides ModelSpec's sizes."""

    intermediate_size: int
    norm_eps: float
    rope: Mapping[str, Any]  # see layers.rotary
    tied_embeddings: bool
    qkv_bias: bool = False
    out_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    head_norm: bool = False  # queries and keys are normed per head
    windows: tuple[int | None, ...] = ()  # of each layer, see hf_config.layer_windows


def build(spec: ModelSpec, shape: DecoderShape, device: torch.device) -> Decoder:
    """Allocate a decoder on `device`; its parameters hold nothing yet."""
    return _Builder(spec, shape, device).decoder()


class _Builder:
    """Collects parameters and linears while it makes the layers."""

    def __init__(self, spec: ModelSpec, shape: DecoderShape, device: torch.device) -> None:
        self._spec = spec
        self._shape = shape
        self._device = device
        self._parameters: dict[str, Parameter] = {}
        self._linears: list[Linear] = []

    def decoder(self) -> Decoder:
        spec, tied = self._spec, self._shape.tied_embeddings
        embedding = self._vocab("model.embed_tokens.")
        return Decoder(
            spec=spec,
            device=self._device,
            rotary=Rotary(
                self._shape.rope, spec.head_dim, max_positions=spec.max_model_len, dtype=spec.dtype, device=self._device
            ),
            embedding=embedding,
            blocks=[self._block(layer) for layer in range(spec.num_layers)],
            norm=self._norm("model.norm."),
            head=self._head(embedding, tied=tied),
            parameters=self._parameters,
            ignored=frozenset({"lm_head.weight"} if tied else ()),
            linears=self._linears,
        )

    def _block(self, layer: int) -> Block:
        prefix = f"model.layers.{layer}."
        return Block(
            attention_norm=self._norm(prefix + "input_layernorm."),
            attention=self._attention(layer, prefix),
            mlp_norm=self._norm(prefix + "post_attention_layernorm."),
            mlp=self._mlp(layer, prefix),
        )

    def _attention(self, layer: int, prefix: str) -> Attention:
        spec, shape = self._spec, self._shape
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        qkv_parts = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
        qkv = self._linear(layer, prefix, spec.hidden_size, qkv_parts, bias=shape.qkv_bias)
        out = self._linear(layer, prefix, queries, {"self_attn.o_proj": spec.hidden_size}, bias=shape.out_bias)
        return Attention(
            layer, qkv, out, self._head_norm(prefix + "self_attn.") if shape.head_norm else None,
            heads=spec.num_heads, head_dim=spec.head_dim,
            window=shape.windows[layer] if shape.windows else None,
        )  # fmt: skip

    def _mlp(self, layer: int, prefix: str) -> GatedMLP:
        hidden, wide, bias = self._spec.hidden_size, self._shape.intermediate_size, self._shape.mlp_bias
        gate_up = self._linear(layer, prefix, hidden, {"mlp.gate_proj": wide, "mlp.up_proj": wide}, bias=bias)
        return GatedMLP(gate_up, self._linear(layer, prefix, wide, {"mlp.down_proj": hidden}, bias=bias))

    def _linear(self, layer: int, prefix: str, in_features: int, parts: Mapping[str, int], *, bias: bool) -> Linear:
        spec = LinearSpec(layer, in_features, tuple(parts.items()))
        storage = STORAGES[self._spec.quantization](
            in_features, tuple(parts.values()), bias=bias, dtype=self._spec.dtype, device=self._device,
            adapter_rows=len(parts) * self._spec.adapter_ranks,
        )  # fmt: skip
        linear = Linear(spec, len(self._linears), storage)
        self._linears.append(linear)
        self._own(prefix, linear.parameters())
        return linear

    def _norm(self, prefix: str) -> RMSNorm:
        norm = RMSNorm(self._spec.hidden_size, self._shape.norm_eps, dtype=self._spec.dtype, device=self._device)
        self._own(prefix, norm.parameters())
        return norm

    def _head_norm(self, prefix: str) -> HeadNorm:
        spec = self._spec
        norm = HeadNorm(
            spec.num_heads, spec.num_kv_heads, spec.head_dim, self._shape.norm_eps,
            dtype=spec.dtype, device=self._device,
        )  # fmt: skip
        self._own(prefix, norm.parameters())
        return norm

    def _vocab(self, prefix: str) -> VocabMatrix:
        matrix = VocabMatrix(self._spec.vocab_size, self._spec.hidden_size, dtype=self._spec.dtype, device=self._device)
        self._own(prefix, matrix.parameters())
        return matrix

    def _head(self, embedding: VocabMatrix, *, tied: bool) -> Head:
        """The output head. What embeds is never quantised, so a quantised head has codes of its own even where the
        checkpoint has one matrix for both."""
        spec = self._spec
        if spec.quantization == "none":
            return embedding if tied else self._vocab("lm_head.")
        head = QuantisedHead(spec.quantization, spec.vocab_size, spec.hidden_size, device=self._device)
        if tied:
            name = "model.embed_tokens.weight"
            self._parameters[name] = replace(self._parameters[name], twin=head.parameters()["weight"])
        else:
            self._own("lm_head.", head.parameters())
        return head

    def _own(self, prefix: str, parameters: Mapping[str, Parameter]) -> None:
        self._parameters.update({prefix + name: parameter for name, parameter in parameters.items()})
