"""Which implementation of an op runs: the one seam between torch references and device kernels.

Each op file maps backend names to its implementations and asks here once a call. The reference is always there.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]

TRITON_DEVICES: frozenset[str] = frozenset({"cuda"})
"""Types of devices that run Triton kernels. Tests in which Triton interprets its kernels add "cpu"."""


def runs_triton(device: torch.device) -> bool:
    """Whether `device` runs Triton kernels, so that what they read should lie as they want it."""
    return device.type in TRITON_DEVICES


def backend(tensor: Tensor, implemented: Container[str] = ("torch",)) -> Backend:
    """The fastest of `implemented` that can run where `tensor` lives. float64 is for proofs: it takes the reference."""
    fast = tensor.dtype != torch.float64 and runs_triton(tensor.device)
    return "triton" if fast and "triton" in implemented else "torch"
