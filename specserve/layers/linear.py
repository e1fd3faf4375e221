"""A linear of the model: its storage's product plus the adapters of the step's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.layers.context import ForwardContext, LoraApplier, LoraUpdate
from specserve.layers.norm import RMSNorm
from specserve.layers.storage import Parameter, Storage
from specserve_adapters.spec import LinearSpec
from specserve_kernels.skinny.ahead import Ahead


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

    def forward(
        self, hidden: Tensor, norm: RMSNorm, ctx: ForwardContext, ahead: Ahead | None = None
    ) -> tuple[Tensor, LoraUpdate | None]:
        """linear(norm(hidden [T, in])) → [T, out], and what its reader has still to add to that. ahead: what `add_to`
        left for this norm.

        Without adapters the storage may norm and multiply at once.
        """
        done = self._ahead(ahead, norm, ctx, gated=False)
        if done is not None:
            return done, None
        if ctx.lora is None:
            return self.storage.matmul(hidden, norm.weight_and_eps), None
        x = norm.forward(hidden)
        folded = self.storage.fold(x, ctx.lora, self.lora_index)
        if folded is not None:
            return self.storage.matmul(x, lora=folded), None
        return self._beside(x, ctx.lora)

    def gated(self, hidden: Tensor, norm: RMSNorm, ctx: ForwardContext, ahead: Ahead | None = None) -> Tensor:
        """silu(first) * second of the halves of linear(norm(hidden [T, in])) → [T, out / 2]; ahead as in `forward`."""
        done = self._ahead(ahead, norm, ctx, gated=True)
        if done is not None:
            return done
        if ctx.lora is None:
            return self.storage.matmul(hidden, norm.weight_and_eps, gated=True)
        x = norm.forward(hidden)
        folded = self.storage.fold(x, ctx.lora, self.lora_index)
        if folded is not None:
            return self.storage.matmul(x, gated=True, lora=folded)
        y, update = self._beside(x, ctx.lora)
        return update.silu_mul(y)

    def _beside(self, x: Tensor, lora: LoraApplier) -> tuple[Tensor, LoraUpdate]:
        """The product of x [T, in], and what its reader has still to add."""
        both = self.storage.matmul_behind(x, lora, self.lora_index)
        if both is not None:
            return both
        update = lora.update(self.lora_index, x)
        return self.storage.matmul(x), update

    def _ahead(self, ahead: Ahead | None, norm: RMSNorm, ctx: ForwardContext, *, gated: bool) -> Tensor | None:
        """The product from what was left for its norm; None: it must be made from the hidden states."""
        if ahead is None or not self.storage.takes_ahead(ahead):
            return None
        folded = None if ctx.lora is None else self.storage.fold(ahead.scaled, ctx.lora, self.lora_index)
        if ctx.lora is not None and folded is None:
            return None
        return self.storage.matmul_ahead(ahead, norm.weight_and_eps, gated=gated, lora=folded)

    def add_to(self, residual: Tensor, x: Tensor, ctx: ForwardContext, then: RMSNorm | None = None) -> Ahead | None:
        """residual [T, out] += linear(x [T, in]), in place: the end of a block's branch, where the ranks' shares are
        summed. Returns what it left for the norm of the residual that comes `then`, if anything."""
        if ctx.communicator.size == 1:
            return self._add_to(residual, x, ctx, then)
        share = torch.zeros_like(residual)
        self._add_to(share, x, ctx, None)
        residual += ctx.communicator.all_reduce(share)
        return None

    def _add_to(self, y: Tensor, x: Tensor, ctx: ForwardContext, then: RMSNorm | None) -> Ahead | None:
        folded = None if ctx.lora is None else self.storage.fold(x, ctx.lora, self.lora_index)
        if ctx.lora is None or folded is not None:  # the product adds itself: an operator less
            return self.storage.add_matmul(y, x, lora=folded, then=None if then is None else then.weight_and_eps)
        both = self.storage.matmul_behind(x, ctx.lora, self.lora_index)
        if both is not None:
            product, shrunk = both
            shrunk.add_to(y, product)
            return None
        update = ctx.lora.update(self.lora_index, x)
        self.storage.add_matmul(y, x)
        update.add_to(y)
        return None
