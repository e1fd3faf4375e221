"""What a product of few tokens takes of adapters, to add their share itself: y = x Wᵀ + Σ B A x in one launch.

See skinny.hopper_fold for how. Nothing is computed here: the product reads x once for W and once for A.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specserve_kernels.lora.tiles import LoraTiles

MOST_FOLDED = 128
"""Tokens up to which a product may add adapters itself."""
MANY_BLOCKS = 16
"""Rank blocks from which on reading A and B takes as long as reading a small W."""


@dataclass(frozen=True, slots=True, eq=False)
class Folded:
    """One linear's adapters: a [S * P * R, in], b [S * R, out] and the parts' widths as in SlotFactors, whose R is
    `rank_stride`; `tiles` of one tile. `many`: expect more than MANY_BLOCKS rank blocks in use; right either way, but
    launched for one or the other. `arrivals` int32 zeros, one for every four blocks of every part, zeros again
    after each product; `ready` [1] int32, 0 before this one."""

    a: Tensor
    b: Tensor
    widths: tuple[int, ...]
    rank_stride: int
    tiles: LoraTiles
    many: bool
    arrivals: Tensor
    ready: Tensor
