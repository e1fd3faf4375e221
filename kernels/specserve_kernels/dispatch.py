"""Which implementation of an op runs: the one seam between torch references and device kernels.

Each op file maps backend names to its implementations and asks here once a call. The reference is always there.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]


def backend(tensor: Tensor, implemented: Container[str] = ("torch",)) -> Backend:
    """The fastest of `implemented` that can run where `tensor` lives. float64 is for proofs: it takes the reference."""
    return "triton" if tensor.is_cuda and "triton" in implemented and tensor.dtype != torch.float64 else "torch"
