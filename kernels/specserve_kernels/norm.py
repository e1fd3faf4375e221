"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x²) + eps) * weight, over the last dimension.

x: [..., n] of any floating dtype; weight: [n], or [heads, n] to norm each head with its own weight. The sum of squares
is taken in fp32 (float64 for float64), and the result has x's dtype. eps: a tensor of one number in the dtype of the
sum, because a Python number would be wrapped anew at every call, which costs as much as the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which x of `dtype` is summed, and of eps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_ref(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    # Fewer and cheaper operators than torch's own rms_norm, which is a chain of eight on the CPU.
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
    inverse = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * inverse).mul_(weight).to(x.dtype)


_IMPLEMENTATIONS = {"torch": rms_norm_ref}


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm of x [..., n] with weight [n] or [heads, n], eps []; a new tensor of x's shape and dtype."""
    assert eps.dtype == sum_dtype(x.dtype), (eps.dtype, x.dtype)
    assert x.shape[-1] == weight.shape[-1], (x.shape, weight.shape)
    return _IMPLEMENTATIONS[backend(x, _IMPLEMENTATIONS)](x, weight, eps)
