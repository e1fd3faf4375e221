"""Self-attention over the paged cache: merged q, k, v → (head norms) → rotary → write → attend → output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specserve.layers.context import ForwardContext
from specserve.layers.linear import Linear
from specserve.layers.norm import HeadNorm
from specserve_kernels.attention import PreparedAttention, paged_attention
from specserve_kernels.kv_cache import write_kv
from specserve_kernels.rotary import rotary


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward share, computed once: prepared attention, cos and signed sin [T, 1, head_dim]."""

    attention: PreparedAttention
    cos: Tensor
    sin: Tensor


class Attention:
    """Grouped-query attention. `qkv` gives [T, (heads + 2 kv_heads) * head_dim]; `norm` norms query and key heads."""

    def __init__(
        self, layer: int, qkv: Linear, out: Linear, norm: HeadNorm | None, *, heads: int, kv_heads: int, head_dim: int
    ) -> None:
        self._layer = layer
        self._qkv = qkv
        self._out = out
        self._norm = norm
        self._heads = heads
        self._kv_heads = kv_heads
        self._head_dim = head_dim
        self._scale = head_dim**-0.5

    def add_to(self, residual: Tensor, x: Tensor, ctx: ForwardContext, step: Step) -> Tensor:
        """residual [T, hidden] + attention(x [T, hidden])."""
        tokens = x.shape[0]
        rotated = self._heads + self._kv_heads
        heads = self._qkv.forward(x, ctx).view(tokens, rotated + self._kv_heads, self._head_dim)
        if ctx.lora is not None:  # an adapter may overflow; what is not finite would outlive its request in the cache
            heads.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        qk, v = heads.split_with_sizes((rotated, self._kv_heads), 1)
        if self._norm is not None:
            qk = self._norm.forward(qk)
        q, k = rotary(qk, step.cos, step.sin).split_with_sizes((self._heads, self._kv_heads), 1)
        k_cache, v_cache = ctx.kv_caches[self._layer]
        write_kv(k, v, k_cache, v_cache, step.attention.slot_mapping)
        attended = paged_attention(q, k_cache, v_cache, step.attention, self._scale)
        return self._out.add_to(residual, attended.view(tokens, -1), ctx)
