"""A linear of the model: its storage's product plus the adapters of the step's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.layers.context import ForwardContext, LoraUpdate
from specserve.layers.norm import RMSNorm
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

    def forward(self, hidden: Tensor, norm: RMSNorm, ctx: ForwardContext) -> tuple[Tensor, LoraUpdate | None]:
        """linear(norm(hidden [T, in])) → [T, out], and what its reader has still to add to that.

        Without adapters the storage may norm and multiply at once.
        """
        if ctx.lora is None:
            return self.storage.matmul(hidden, norm.weight_and_eps), None
        x = norm.forward(hidden)
        folded = self.storage.fold(x, ctx.lora, self.lora_index)
        if folded is not None:
            return self.storage.matmul(x, lora=folded), None
        update = ctx.lora.update(self.lora_index, x)
        return self.storage.matmul(x), update

    def gated(self, hidden: Tensor, norm: RMSNorm, ctx: ForwardContext) -> Tensor:
        """silu(first) * second of the halves of linear(norm(hidden [T, in])) → [T, out / 2]."""
        if ctx.lora is None:
            return self.storage.matmul(hidden, norm.weight_and_eps, gated=True)
        x = norm.forward(hidden)
        folded = self.storage.fold(x, ctx.lora, self.lora_index)
        if folded is not None:
            return self.storage.matmul(x, gated=True, lora=folded)
        update = ctx.lora.update(self.lora_index, x)
        return update.silu_mul(self.storage.matmul(x))

    def add_to(self, residual: Tensor, x: Tensor, ctx: ForwardContext) -> None:
        """residual [T, out] += linear(x [T, in]), in place: the end of a block's branch, where the ranks' shares are
        summed."""
        if ctx.communicator.size == 1:
            self._add_to(residual, x, ctx)
            return
        share = torch.zeros_like(residual)
        self._add_to(share, x, ctx)
        residual += ctx.communicator.all_reduce(share)

    def _add_to(self, y: Tensor, x: Tensor, ctx: ForwardContext) -> None:
        folded = None if ctx.lora is None else self.storage.fold(x, ctx.lora, self.lora_index)
        if ctx.lora is None or folded is not None:
            self.storage.add_matmul(y, x, lora=folded)  # the product adds itself: an operator less
            return
        update = ctx.lora.update(self.lora_index, x)
        self.storage.add_matmul(y, x)
        update.add_to(y)
