"""LoRA of a mixed batch: each token adds the products of the adapters of its own row (Hu et al. 2021).

    y[t] += Σ_j weights[t, j] * (x[t] · a[rows[j]]) * b[rows[j]]

x [T, in_features], y [T, out_features] in the model's dtype; a [N, in_features], b [N, out_features] hold the rank
rows of all adapter slots; rows [n] int64 picks those in use; weights [T, n] (float32, float64 for a float64 model) is
the request's weight where the token's row uses the row's slot, else 0. Segmented products over many adapters:
Punica's SGMV (Chen et al. 2023); here one dense product over the rows in use, masked by the weights.

This is the way of the CPU and of float64; a GPU takes `grouped_lora`, whose batches are made on the device.

float64 is computed in float64, everything else in float32 and rounded once, when it is added to y: then no adapter can
overflow into a token that does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve_kernels.activation import silu_mul
from specserve_kernels.dispatch import backend
from specserve_kernels.qkv import HeadWeights, rotate_and_cache

Factors = tuple[Tensor, Tensor]  # (aᵀ [in_features, n], b [n, out_features]) of the rows in use, in computing precision


def lora_ref(x: Tensor, y: Tensor, a: Tensor, b: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The formula above in torch, in place: returns y."""
    return _add_product(x, y, _gather(a, b, rows), weights)


def _gather(a: Tensor, b: Tensor, rows: Tensor) -> Factors:
    precision = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.index_select(0, rows).to(precision).t().contiguous(), b.index_select(0, rows).to(precision)


def _add_product(x: Tensor, y: Tensor, factors: Factors, weights: Tensor) -> Tensor:
    a_t, b = factors
    if y.dtype == b.dtype:
        return y.addmm_(torch.mm(x, a_t).mul_(weights), b)
    return y.add_(torch.mm(torch.mm(x.to(b.dtype), a_t).mul_(weights), b))


_IMPLEMENTATIONS = {"torch": lora_ref}


def lora(x: Tensor, y: Tensor, a: Tensor, b: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The formula above, in place: returns y. Raises ValueError for shapes and dtypes that do not fit it."""
    _check(x, y, a, b, rows, weights)
    return _IMPLEMENTATIONS[backend(x, _IMPLEMENTATIONS)](x, y, a, b, rows, weights)


def _check(x: Tensor, y: Tensor, a: Tensor, b: Tensor, rows: Tensor, weights: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (x, y, a, b, rows, weights)]
    if [len(shape) for shape in shapes] != [2, 2, 2, 2, 1, 2]:
        raise ValueError(f"lora takes x, y, a, b and weights with two dimensions and rows with one, got {shapes}.")
    tokens, rank_rows = x.shape[0], rows.shape[0]
    fits = y.shape[0] == tokens and a.shape[0] == b.shape[0] and weights.shape == (tokens, rank_rows)
    if not fits or x.shape[1] != a.shape[1] or y.shape[1] != b.shape[1]:
        raise ValueError(f"lora: shapes of x, y, a, b, rows, weights do not fit each other: {shapes}.")
    if not x.dtype == y.dtype == a.dtype == b.dtype:
        raise ValueError(f"lora takes x, y, a, b of one dtype, got {[t.dtype for t in (x, y, a, b)]}.")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.dtype != wanted or rows.dtype != torch.int64:
        raise ValueError(f"lora takes int64 rows and {wanted} weights, got {rows.dtype} and {weights.dtype}.")


@dataclass(frozen=True, slots=True, eq=False)
class LoraBatch:
    """The adapters of one forward's tokens, built once and used by every linear of the model.

    `pool[i]` = (a [S * P * R, in_features], b [S * P * R, out_features]) of linear i with `parts[i]` = P merged
    modules, S slots, R the largest rank. `rows[P]` [n] and `weights[P]` [T, n] as above. `factors[i]`, filled at the
    first use, keeps the gathered rows, shared by batches of the same slots: a linear then costs three operations. It is
    a second copy of the active slots; None, where memory is dear, gathers at every use.
    """

    pool: Sequence[tuple[Tensor, Tensor]]
    parts: tuple[int, ...]
    rows: Mapping[int, Tensor]
    weights: Mapping[int, Tensor]
    factors: list[Factors | None] | None

    def update(self, linear_index: int, x: Tensor) -> LoraProduct:
        """What linear `linear_index` gains for x [T, in_features]; computed where it is added."""
        return LoraProduct(self.apply, linear_index, x)

    def apply(self, linear_index: int, x: Tensor, y: Tensor) -> None:
        """y += the adapters' product of linear `linear_index`, in place. x [T, in_features], y [T, out_features]."""
        parts = self.parts[linear_index]
        factors = self.factors[linear_index] if self.factors is not None else None
        if factors is None:
            factors = _gather(*self.pool[linear_index], self.rows[parts])
            if self.factors is not None:
                self.factors[linear_index] = factors
        _add_product(x, y, factors, self.weights[parts])


@dataclass(frozen=True, slots=True, eq=False)
class LoraProduct:
    """What one linear gains: `apply(linear_index, x, y)` adds it to the linear's output y, before that is read."""

    apply: Callable[[int, Tensor, Tensor], None]
    linear_index: int
    x: Tensor

    def add_to(self, y: Tensor) -> None:
        """y [T, out_features] += the gain, in place."""
        self.apply(self.linear_index, self.x, y)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu_mul of gate_up [T, 2 n] plus the gain; gate_up is used up."""
        self.add_to(gate_up)
        return silu_mul(gate_up)

    def rotate_and_cache(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
        *, heads: int, norm: HeadWeights | None, finite: bool,
    ) -> Tensor:  # fmt: skip
        """rotate_and_cache of qkv plus the gain."""
        self.add_to(qkv)
        return rotate_and_cache(qkv, cos, sin, k_cache, v_cache, slot_mapping, heads=heads, norm=norm, finite=finite)
