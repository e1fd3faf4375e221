"""RMSNorm layers: over the hidden size, and per head over queries and keys side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from specserve.layers.storage import Parameter, whole
from specserve_kernels.norm import rms_norm, sum_dtype


class RMSNorm:
    """y = x / rms(x) * weight over the last dimension, [T, size]."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self._weight = torch.empty(size, dtype=dtype, device=device)
        self._eps = torch.tensor(eps, dtype=sum_dtype(dtype), device=device)

    def parameters(self) -> dict[str, Parameter]:
        return {"weight": whole(self._weight)}

    @property
    def weight_and_eps(self) -> tuple[Tensor, Tensor]:
        """(weight [size], eps []), as the kernels take them."""
        return self._weight, self._eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._eps)


class HeadNorm:
    """What norms each query head by one weight and each key head by another (Qwen3), inside rotate_and_cache."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._weight = torch.empty(num_heads + num_kv_heads, head_dim, dtype=dtype, device=device)
        self._num_heads = num_heads
        self._eps = torch.tensor(eps, dtype=sum_dtype(dtype), device=device)

    def parameters(self) -> dict[str, Parameter]:
        """One checkpoint vector [head_dim] fills the rows of all query heads, one those of all key heads."""
        queries, keys = self._weight[: self._num_heads], self._weight[self._num_heads :]
        shape = (self._weight.shape[1],)
        return {"q_norm.weight": Parameter(queries, shape), "k_norm.weight": Parameter(keys, shape)}

    @property
    def weight_and_eps(self) -> tuple[Tensor, Tensor]:
        """(weight [num_heads + num_kv_heads, head_dim], eps []), as specserve_kernels.qkv takes them."""
        return self._weight, self._eps
