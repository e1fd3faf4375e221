"""SwiGLU's gate (Shazeer 2020): silu(gate) * up = gate * sigmoid(gate) * up.

gate_up: [tokens, 2 * n], gates first; result [tokens, n] of the same dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.dispatch import backend


def silu_mul_ref(gate_up: Tensor) -> Tensor:
    size = gate_up.shape[-1] // 2
    gate, up = gate_up.split_with_sizes((size, size), -1)
    return F.silu(gate).mul_(up)


_IMPLEMENTATIONS = {"torch": silu_mul_ref}


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of gate_up [tokens, 2 * n] → [tokens, n]."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    return _IMPLEMENTATIONS[backend(gate_up, _IMPLEMENTATIONS)](gate_up)
