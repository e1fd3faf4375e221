"""How a linear's weights are kept: allocated once, filled part by part from a checkpoint, multiplied.

A storage of another kind is another class with the same methods (layers.quantised), and a line in layers.storages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specserve.layers.context import LoraApplier
from specserve_kernels.activation import silu_mul
from specserve_kernels.dispatch import runs_triton
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import GroupedLora
from specserve_kernels.norm import rms_norm
from specserve_kernels.skinny.ahead import Ahead
from specserve_kernels.skinny.codes import Coded, encode
from specserve_kernels.skinny.linear import (
    Norm,
    add_skinny_linear,
    arrivals,
    is_skinny,
    leaves_ahead,
    skinny_linear,
    skinny_linear_ahead,
    takes_ahead,
    takes_lora,
)


@dataclass(frozen=True, slots=True)
class Parameter:
    """Where one checkpoint tensor goes: `shape` as the checkpoint has it, `destination` broadcastable from it.

    With `scales`, the destination takes codes of the tensor (specserve_kernels.skinny.codes). `twin`: another place for
    the same tensor.
    """

    destination: Tensor
    shape: tuple[int, ...]
    scales: Tensor | None = None
    twin: Parameter | None = None

    @property
    def nbytes(self) -> int:
        """Of what is filled; scales, which are few, left out."""
        return self.destination.nbytes + (self.twin.nbytes if self.twin is not None else 0)

    def rows(self, first: int, last: int) -> Parameter:
        """What takes rows first … last - 1 of the checkpoint's tensor, which must not be broadcast."""
        part = self.destination[first:last]
        scales = None if self.scales is None else self.scales[first:last]
        return Parameter(part, tuple(part.shape), scales, None if self.twin is None else self.twin.rows(first, last))

    def load(self, tensor: Tensor) -> None:
        """Copy, converting device and dtype, or quantise."""
        if self.scales is None:
            self.destination.copy_(tensor)
        else:
            encode(tensor, Coded(self.destination, self.scales))
        if self.twin is not None:
            self.twin.load(tensor)


def whole(tensor: Tensor) -> Parameter:
    """The parameter that is a checkpoint tensor as it stands."""
    return Parameter(tensor, tuple(tensor.shape))


class Storage(Protocol):
    """Weights of one (merged) linear."""

    def parameters(self) -> Sequence[dict[str, Parameter]]:
        """For each part in merged order, its checkpoint tensors by suffix ("weight", "bias", …)."""

    def matmul(self, x: Tensor, norm: Norm | None = None, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        """x [T, in] → a new [T, out] tensor: x Wᵀ + bias. `norm` (weight [in], eps []): of RMS-normed x. `gated`: the
        two halves of out go through silu(first) * second, which leaves [T, out / 2]. `lora`, from `fold`: is added to
        the product."""

    def add_matmul(self, y: Tensor, x: Tensor, *, lora: Folded | None = None, then: Norm | None = None) -> Ahead | None:
        """y [T, out] += x Wᵀ + bias, in place; `lora` as above. What it leaves for the norm of y that comes `then`, if
        anything."""

    def takes_ahead(self, ahead: Ahead) -> bool:
        """Whether `matmul_ahead` is for what was left."""

    def matmul_ahead(self, ahead: Ahead, norm: Norm, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        """`matmul` of what `ahead` was left of, with the norm that it was left for; `lora` is of ahead.scaled."""

    def fold(self, x: Tensor, lora: LoraApplier, linear_index: int) -> Folded | None:
        """What the product of x takes of linear `linear_index`'s adapters into itself; None: its reader adds them."""


class DenseStorage:
    """A plain matrix and an optional bias [out] in the model's dtype.

    On a CPU the matrix lies as [in, out], the transpose of a checkpoint's: with few tokens, its libraries multiply by
    it a third faster. On a GPU it lies as checkpoints have it, each output's weights side by side.
    """

    def __init__(
        self, in_features: int, widths: Sequence[int], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._widths = tuple(widths)
        shape = (in_features, sum(widths))
        if runs_triton(device):
            self._weight = torch.empty(shape[::-1], dtype=dtype, device=device).t()
        else:
            self._weight = torch.empty(shape, dtype=dtype, device=device)
        self._bias = torch.empty(sum(widths), dtype=dtype, device=device) if bias else None
        self._arrivals = arrivals(device)

    def parameters(self) -> list[dict[str, Parameter]]:
        parts = [{"weight": whole(rows)} for rows in self._weight.t().split_with_sizes(self._widths)]
        if self._bias is not None:
            for part, values in zip(parts, self._bias.split_with_sizes(self._widths), strict=True):
                part["bias"] = whole(values)
        return parts

    def matmul(self, x: Tensor, norm: Norm | None = None, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        if self._bias is None and is_skinny(x):
            return skinny_linear(x, self._weight.t(), norm=norm, gated=gated, lora=lora, arrivals=self._arrivals)
        x = x if norm is None else rms_norm(x, *norm)
        y = torch.mm(x, self._weight) if self._bias is None else torch.addmm(self._bias, x, self._weight)
        return silu_mul(y) if gated else y

    def add_matmul(self, y: Tensor, x: Tensor, *, lora: Folded | None = None, then: Norm | None = None) -> Ahead | None:
        weight = self._weight.t()
        if self._bias is None and then is not None and leaves_ahead(x, weight, lora):
            return add_skinny_linear(y, x, weight, then[0], lora=lora, arrivals=self._arrivals)
        if self._bias is None and is_skinny(x):
            skinny_linear(x, weight, residual=y, lora=lora, arrivals=self._arrivals)
            return None
        y.addmm_(x, self._weight)
        if self._bias is not None:
            y.add_(self._bias)
        return None

    def takes_ahead(self, ahead: Ahead) -> bool:
        return self._bias is None and takes_ahead(ahead, self._weight.t())

    def matmul_ahead(self, ahead: Ahead, norm: Norm, *, gated: bool = False, lora: Folded | None = None) -> Tensor:
        return skinny_linear_ahead(ahead, norm[1], self._weight.t(), gated=gated, lora=lora, arrivals=self._arrivals)

    def fold(self, x: Tensor, lora: LoraApplier, linear_index: int) -> Folded | None:
        if self._bias is not None or not isinstance(lora, GroupedLora):
            return None
        fits = lora.foldable and takes_lora(x, self._weight.t(), lora.linears[linear_index])
        return lora.fold(linear_index, x) if fits else None
