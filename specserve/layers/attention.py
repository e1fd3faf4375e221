"""Self-attention over the paged cache: merged q, k, v → (head norms) → rotary → write → attend → output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specserve.layers.context import ForwardContext, LoraUpdate
from specserve.layers.linear import Linear
from specserve.layers.norm import HeadNorm, RMSNorm
from specserve_kernels.attention.paged import PreparedAttention, paged_attention, qkv_attention
from specserve_kernels.qkv import rotate_and_cache
from specserve_kernels.skinny.ahead import Ahead


@dataclass(frozen=True, slots=True)
class Step:
    """What the layers of one forward share, computed once: prepared attention, cos and signed sin [T, 1, head_dim]."""

    attention: PreparedAttention
    cos: Tensor
    sin: Tensor


class Attention:
    """Grouped-query attention. `qkv` gives [T, (heads + 2 kv_heads) * head_dim]; `head_norm` norms query and key heads.

    `window`: a token at position p sees keys at p - window < j <= p alone; None: at all j <= p. The cache keeps the
    whole context all the same: blocks behind every layer's window are neither freed nor counted less.
    """

    def __init__(
        self,
        layer: int,
        qkv: Linear,
        out: Linear,
        head_norm: HeadNorm | None,
        *,
        heads: int,
        head_dim: int,
        window: int | None = None,
    ) -> None:
        self._layer = layer
        self._qkv = qkv
        self._out = out
        self._head_norm = head_norm
        self._heads = heads
        self._scale = head_dim**-0.5
        self._window = window

    def add_to(
        self, residual: Tensor, norm: RMSNorm, ctx: ForwardContext, step: Step, ahead: Ahead | None, then: RMSNorm
    ) -> Ahead | None:
        """residual [T, hidden] += attention(norm(residual)), in place; `ahead` and `then` as in Linear."""
        qkv, update = self._qkv.forward(residual, norm, ctx, ahead)
        attended = self._attend(qkv, update, ctx, step)
        return self._out.add_to(residual, attended.reshape(residual.shape[0], -1), ctx, then)

    def _attend(self, qkv: Tensor, update: LoraUpdate | None, ctx: ForwardContext, step: Step) -> Tensor:
        """[T, heads, head_dim]. What adapters add to qkv is taken in where qkv is read first, which attention itself
        can only be where nothing is left to add."""
        k_cache, v_cache = ctx.kv_caches[self._layer]
        norm = self._head_norm.weight_and_eps if self._head_norm is not None else None
        finite = ctx.lora is not None  # an adapter may overflow; the cache must not keep what is not finite
        if update is None and step.attention.takes_qkv:
            return qkv_attention(
                qkv, step.cos, step.sin, k_cache, v_cache, step.attention, self._scale, self._window,
                norm=norm, finite=finite,
            )  # fmt: skip
        rotate = rotate_and_cache if update is None else update.rotate_and_cache
        q = rotate(
            qkv, step.cos, step.sin, k_cache, v_cache, step.attention.slot_mapping,
            heads=self._heads, norm=norm, finite=finite,
        )  # fmt: skip
        return paged_attention(q, k_cache, v_cache, step.attention, self._scale, self._window)
