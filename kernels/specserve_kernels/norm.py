"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x²) + eps) * weight, over the last dimension.

x: [..., n] of any floating dtype; weight: [n], or [heads, n] to norm each head with its own weight. The sum of squares
is taken in fp32 (float64 for float64), and the result has x's dtype. eps: a tensor of one number in the dtype of the
sum, because a Python number would be wrapped anew at every call, which costs as much as the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import overlaps, wait


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which x of `dtype` is summed, and of eps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_ref(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    # Fewer and cheaper operators than torch's own rms_norm, which is a chain of eight on the CPU.
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=eps.dtype)
    inverse = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * inverse).mul_(weight).to(x.dtype)


@relaunched
@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, eps_ptr, out_ptr, rows,
    SIZE: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x [rows, SIZE] a program; row r takes weight row r % HEADS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < SIZE)
    eps = tl.load(eps_ptr)
    if HEADS == 1:
        weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0)
    else:
        weight = tl.load(weight_ptr + row % HEADS * SIZE + column, mask=inside, other=0.0)
    at = row.to(tl.int64) * SIZE + column
    wait(PDL)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / SIZE + eps)
    tl.store(out_ptr + at, (x * inverse * weight.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=inside)


def _tile(size: int) -> tuple[int, int, int]:
    """(rows a program, padded row, warps): long rows alone, with two 16-byte loads a thread; short ones together."""
    block = power_of_2(size)
    rows = max(1, 1024 // block)
    return rows, block, min(max(rows * block // 512, 1), 16)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    rows, (tile, block, warps), pdl = x.numel() // size, _tile(size), overlaps(x)
    _rms_norm_kernel[(cdiv(rows, tile),)](
        x, weight, eps, out, rows,
        SIZE=size, HEADS=weight.numel() // size, ROWS=tile, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


_IMPLEMENTATIONS = {"torch": rms_norm_ref, "triton": rms_norm_triton}


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm of x [..., n] with weight [n] or [heads, n], eps []; a new tensor of x's shape and dtype."""
    assert eps.dtype == sum_dtype(x.dtype), (eps.dtype, x.dtype)
    assert x.shape[-1] == weight.shape[-1], (x.shape, weight.shape)
    assert weight.dim() == 1 or x.shape[-2] == weight.shape[0], (x.shape, weight.shape)
    return _IMPLEMENTATIONS[backend(x, _IMPLEMENTATIONS)](x, weight, eps)
