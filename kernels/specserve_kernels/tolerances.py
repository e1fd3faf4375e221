"""How far two computations of the same thing may differ, in one table, with reasons.

Values are (relative, absolute), to be used as torch.testing.assert_close does: |a - b| <= atol + rtol * |b|.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

Tolerance = tuple[float, float]

OP: MappingProxyType[torch.dtype, Tolerance] = MappingProxyType(
    {
        # One op against an independent formulation. A few units in the last place, times the square root of the
        # reduction's length (hundreds) because the order of summation differs.
        torch.float64: (1e-12, 1e-12),
        torch.float32: (2e-5, 2e-6),
        # Inputs and output are rounded to 8 (11) bits; reductions are in fp32, so the output's rounding dominates.
        torch.bfloat16: (1.6e-2, 1e-2),
        torch.float16: (2e-3, 1e-3),
    }
)

MODEL: MappingProxyType[torch.dtype, Tolerance] = MappingProxyType(
    {
        # Logits of a tiny model (order 1) computed in two ways: rounding accumulates over layers; merged products,
        # the residual added inside the product and attention over padded keys all reorder sums.
        torch.float64: (1e-10, 1e-10),
        torch.float32: (1e-4, 2e-5),
        torch.bfloat16: (5e-2, 5e-2),
        torch.float16: (1e-2, 1e-2),
    }
)
