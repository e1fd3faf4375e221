"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x²) + eps) * weight, over the last dimension.

x: [..., n] of any floating dtype; weight: [n], or [heads, n] to norm each head with its own weight. The sum of squares
is taken in fp32 (float64 for float64), and the result has x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Fewer and cheaper operators than torch's own rms_norm, which is a chain of eight on the CPU.
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight).to(x.dtype)


_IMPLEMENTATIONS = {"torch": rms_norm_ref}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [..., n] with weight [n] or [heads, n]; a new tensor of x's shape and dtype."""
    assert x.shape[-1] == weight.shape[-1], (x.shape, weight.shape)
    return _IMPLEMENTATIONS[backend(x, _IMPLEMENTATIONS)](x, weight, eps)
