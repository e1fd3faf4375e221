"""A linear of the model: its storage's product plus the adapters of the step's tokens."""

from __future__ import annotations

from torch import Tensor

from specserve.layers.context import ForwardContext
from specserve.layers.storage import Parameter, Storage
from specserve_adapters.spec import LinearSpec


class Linear:
    """One merged linear. `spec` says what it is made of, `lora_index` is its place in `model.linears`."""

    def __init__(self, spec: LinearSpec, lora_index: int, storage: Storage) -> None:
        self.spec = spec
        self.lora_index = lora_index
        self.storage = storage

    def parameters(self) -> dict[str, Parameter]:
        """Checkpoint tensors by "<module>.<suffix>", without the layer's prefix."""
        return {
            f"{name}.{suffix}": parameter
            for (name, _), part in zip(self.spec.parts, self.storage.parameters(), strict=True)
            for suffix, parameter in part.items()
        }

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x [T, in] → [T, out]."""
        y = self.storage.matmul(x)
        if ctx.lora is not None:
            ctx.lora.apply(self.lora_index, x, y)
        return y

    def add_to(self, residual: Tensor, x: Tensor, ctx: ForwardContext) -> None:
        """residual [T, out] += linear(x [T, in]), in place: the end of a block's branch, where the ranks' shares are
        summed."""
        if ctx.communicator.size > 1:
            residual += ctx.communicator.all_reduce(self.forward(x, ctx))
            return
        self.storage.add_matmul(residual, x)  # the product adds itself: an operator less
        if ctx.lora is not None:
            ctx.lora.apply(self.lora_index, x, residual)
