"""A norm between two products that takes no kernel of its own.

    h = residual + x Vᵀ,   y = (h · rsqrt(mean(h²) + eps) * g) Wᵀ     h: [rows, n]; g: [n]

The factor of a row is one number, which may as well multiply the second product's sums: y = factor · ((h * g) Wᵀ). So
the first product leaves h * g beside h, and for each of its tiles of columns the sum of h² of each row; the second one
multiplies h * g and adds those sums up. Both are part of what the kernels do anyway while their data lies in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import cdiv

TILE = 64  # columns of h that one program of the first product makes


class Ahead(NamedTuple):
    """What a product leaves for the norm of h [rows, n]: scaled [rows, n] = h * g, of h's dtype; squares [tiles, rows
    rounded up to a power of two, 8 or more] fp32: Σ h² over each tile of 64 columns."""

    scaled: Tensor
    squares: Tensor


def padded_rows(rows: int) -> int:
    return max(8, 1 << (rows - 1).bit_length())


def empty_ahead(h: Tensor) -> Ahead:
    """Room for what is left of h."""
    rows, size = h.shape
    squares = torch.empty(cdiv(size, TILE), padded_rows(rows), dtype=torch.float32, device=h.device)
    return Ahead(h.new_empty(rows, size), squares)


def leave_ref(h: Tensor, gain: Tensor) -> Ahead:
    """What a product that made h leaves; in float64 for float64."""
    ahead = empty_ahead(h)
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    squares = torch.zeros(ahead.squares.shape, dtype=wide.dtype, device=h.device)
    for tile, columns in enumerate(wide.square().split(TILE, dim=1)):
        squares[tile, : len(h)] = columns.sum(1)
    return Ahead(ahead.scaled.copy_(wide * gain.to(wide.dtype)), squares)


def factors_ref(ahead: Ahead, eps: Tensor) -> Tensor:
    """[rows, 1]: rsqrt(mean(h²) + eps)."""
    rows, size = ahead.scaled.shape
    return (ahead.squares[:, :rows].sum(0) / size + eps).rsqrt_().unsqueeze(1)
