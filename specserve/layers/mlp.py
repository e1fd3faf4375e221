"""The gated MLP of Llama-like blocks: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor

from specserve.layers.context import ForwardContext
from specserve.layers.linear import Linear
from specserve.layers.norm import RMSNorm
from specserve_kernels.skinny.ahead import Ahead


class GatedMLP:
    """`gate_up` gives [T, 2 * intermediate], gates first; `down` takes [T, intermediate]."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self._gate_up = gate_up
        self._down = down

    def add_to(
        self, residual: Tensor, norm: RMSNorm, ctx: ForwardContext, ahead: Ahead | None, then: RMSNorm | None
    ) -> Ahead | None:
        """residual [T, hidden] += mlp(norm(residual)), in place; `ahead` and `then` as in Linear."""
        return self._down.add_to(residual, self._gate_up.gated(residual, norm, ctx, ahead), ctx, then)
