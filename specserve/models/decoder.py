"""The pre-norm decoder that Llama-like families share, and its forward pass.

h ← h + attention(norm(h));  h ← h + mlp(norm(h));  logits = head(norm(h))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.layers.attention import Attention, Step
from specserve.layers.context import ForwardContext
from specserve.layers.embedding import Head, VocabMatrix
from specserve.layers.linear import Linear
from specserve.layers.mlp import GatedMLP
from specserve.layers.norm import RMSNorm
from specserve.layers.rotary import Rotary
from specserve.layers.storage import Parameter
from specserve.models.spec import ModelSpec
from specserve_kernels.attention.paged import AttentionShape, prepare
from specserve_kernels.skinny.ahead import Ahead


@dataclass(frozen=True, slots=True)
class Block:
    """One layer of the decoder."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP

    def forward(
        self, hidden: Tensor, ctx: ForwardContext, step: Step, ahead: Ahead | None, then: RMSNorm | None
    ) -> Ahead | None:
        """hidden [T, hidden] goes through the layer, in place. ahead: what the layer before left for this one's first
        norm; returns what this one leaves for the norm that comes `then`."""
        ahead = self.attention.add_to(hidden, self.attention_norm, ctx, step, ahead, self.mlp_norm)
        return self.mlp.add_to(hidden, self.mlp_norm, ctx, ahead, then)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model. No tensor of it asks for gradients; run it under torch.inference_mode().

    `parameters`: every checkpoint tensor by its name there, allocated; the loader fills them. `ignored`: checkpoint
    tensors that may be present and are not needed. `linears`: all that adapters may touch, in order of lora_index.
    """

    spec: ModelSpec
    device: torch.device
    parameters: Mapping[str, Parameter]
    ignored: frozenset[str]
    linears: Sequence[Linear]
    rotary: Rotary
    embedding: VocabMatrix
    blocks: Sequence[Block]
    norm: RMSNorm
    head: Head

    def forward(self, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """Token ids [T] int64 → hidden states [T, hidden] after the last norm. Writes the tokens' keys and values."""
        meta = ctx.attention
        spec = self.spec
        shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype)
        cos, sin = self.rotary.at(meta.positions)
        step = Step(prepare(meta, shape), cos, sin)
        hidden = self.embedding.embed(input_ids)
        ahead = None
        norms = [*(block.attention_norm for block in self.blocks[1:]), None]
        for block, then in zip(self.blocks, norms, strict=True):
            ahead = block.forward(hidden, ctx, step, ahead, then)
        return self.norm.forward(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, hidden] → logits [N, vocab], in the model's dtype."""
        return self.head.logits(hidden)
