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
from specserve_kernels.lora.grouped import GroupedLora, Shrunk
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

    @property
    def behind(self) -> Tensor | None:
        """Rows [n, in] behind the weights, for the A of this linear's adapters in all slots; None: there are none."""

    def matmul_behind(self, x: Tensor, lora: LoraApplier, linear_index: int) -> tuple[Tensor, Shrunk] | None:
        """`matmul` of x by weights and A together: the output [T, out], whose rows may lie apart, and the first half
        of the adapters. None: A is not behind the weights."""


MOST_BEHIND = 1 / 16
"""Of a matrix' rows, how many more are multiplied to have x Aᵀ of all slots along with the output. Eight slots of rank
16 are 1 to 6 % of an 8B's; with sixteen, it is as fast to read x once more and only the A in use."""


class DenseStorage:
    """A plain matrix and an optional bias [out] in the model's dtype.

    On a CPU the matrix lies as [in, out], the transpose of a checkpoint's: with few tokens, its libraries multiply by
    it a third faster. On a GPU it lies as checkpoints have it, each output's weights side by side, and `adapter_rows`
    behind them for the A of adapters, if they are few beside it.
    """

    def __init__(
        self, in_features: int, widths: Sequence[int], *, bias: bool, dtype: torch.dtype, device: torch.device,
        adapter_rows: int = 0,
    ) -> None:  # fmt: skip
        self._widths = tuple(widths)
        size = sum(widths)
        self._behind: Tensor | None = None
        if runs_triton(device):
            # float16 has not the range of what is shrunk
            fits = dtype != torch.float16 and 0 < adapter_rows <= size * MOST_BEHIND
            self._all = torch.empty(size + (adapter_rows if fits else 0), in_features, dtype=dtype, device=device).t()
            self._behind = self._all.t()[size:] if fits else None
        else:
            self._all = torch.empty(in_features, size, dtype=dtype, device=device)
        self._weight = self._all[:, :size]
        self._all_bias = torch.zeros(self._all.shape[1], dtype=dtype, device=device) if bias else None
        self._bias = None if self._all_bias is None else self._all_bias[:size]
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
        y = _product(x, self._weight, self._bias)
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

    @property
    def behind(self) -> Tensor | None:
        return self._behind

    def matmul_behind(self, x: Tensor, lora: LoraApplier, linear_index: int) -> tuple[Tensor, Shrunk] | None:
        if self._behind is None or not isinstance(lora, GroupedLora) or not lora.splits:
            return None
        if lora.linears[linear_index].a.data_ptr() != self._behind.data_ptr():
            return None
        return lora.split(linear_index, _product(x, self._all, self._all_bias))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] by weight [in, out] → [T, out]."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
