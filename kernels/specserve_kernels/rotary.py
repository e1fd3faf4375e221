"""Rotary position embedding (Su et al. 2021), half-split as in Llama: dimension i turns with dimension i + d/2.

    (y[i], y[i + d/2]) = (x[i] cos a - x[i + d/2] sin a, x[i + d/2] cos a + x[i] sin a)

With cos = (cos a, cos a) and the signed sin = (-sin a, sin a), both [tokens, 1, head_dim] and made once a step, this is
x * cos + swap_halves(x) * sin for all heads of queries and keys at once. A building block: layers call
qkv.rotate_and_cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_ref(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [tokens, heads, head_dim] (queries and keys side by side) by cos and signed sin
    [tokens, 1, head_dim], all of one dtype; a new contiguous tensor."""
    tokens, count, dim = heads.shape
    swapped = heads.view(tokens, count, 2, dim // 2).flip(2).view(tokens, count, dim)
    return torch.addcmul(heads * cos, swapped, sin)
