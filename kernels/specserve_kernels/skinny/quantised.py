"""Products of few rows with a matrix of one byte an element (see codes): y = scales · (x codesᵀ), as skinny.linear's.

    plain     y = x Wᵀ                                 x: [rows, in]; W: [out, in] as codes and scales; y: [rows, out]
    residual  y = residual + x Wᵀ                      residual: [rows, out], overwritten with y
    norm      y = rsqrt(mean(x²) + eps) (x * g) Wᵀ     RMSNorm first (g: [in])
    gated     y = silu(x Wgᵀ) * (x Wuᵀ)                W = [Wg; Wu]: [2 out, in]; y: [rows, out]
    lora      x Wᵀ + Σ s·B wherever x Wᵀ stands        s = x Aᵀ; of `GroupedLora.fold`, where `takes_lora`

Only weights are quantised: x keeps its dtype, codes are widened to it in registers, which is exact, sums are fp32 and
take their scale at the end. So a row's result does not depend on how many there are, except for rounding. One row goes
through skinny.linear's kernel, up to eight of bfloat16 through quantised_words, others up to MAX_ROWS through
quantised_rows, with the norm as a kernel of its own, a few with adapters through quantised_lora; more rows multiply by
the decoded matrix, with the library: what decoding costs (five bytes moved an element) is then little beside the
product.

On a CPU, int8 and few rows of float32 take torch's weight-only product, which rounds x and y to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specserve_kernels.activation import silu_mul
from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import SlotFactors
from specserve_kernels.norm import rms_norm
from specserve_kernels.overlap import overlaps
from specserve_kernels.skinny.codes import Coded, decode
from specserve_kernels.skinny.linear import Cut, Norm, one_row_kernel, skinny_linear_ref
from specserve_kernels.skinny.quantised_lora import fits, quantised_lora_triton
from specserve_kernels.skinny.quantised_rows import quantised_rows_triton
from specserve_kernels.skinny.quantised_words import quantised_words_triton, takes_words

MAX_ROWS = 512
"""Beyond so many rows the library's product, of the decoded matrix, is the better one."""
MAX_CPU_ROWS = 32
"""Beyond so many rows decoding and multiplying in float32 is faster than torch's weight-only int8 product."""
ONE_ROW_CUT: Cut = {"BN": 4, "BK": 1024, "stages": 2, "warps": 4}
"""Of any matrix, for one row."""


def quantised_linear_ref(x: Tensor, weight: Coded, residual: Tensor | None, norm: Norm | None, gated: bool) -> Tensor:
    return skinny_linear_ref(x, decode(weight, x.dtype), residual, norm, gated)


def quantised_one_row_triton(
    x: Tensor, weight: Coded, residual: Tensor | None, norm: Norm | None, gated: bool
) -> Tensor:
    """x: [1, in]."""
    codes, scales = weight
    (rows, in_dim), out_dim = x.shape, codes.shape[0] // 2 if gated else codes.shape[0]
    assert rows == 1, rows
    out, cut = x.new_empty(1, out_dim) if residual is None else residual, ONE_ROW_CUT
    overlap = overlaps(x)
    gain, eps = (x, x) if norm is None else norm
    one_row_kernel[(cdiv(codes.shape[0], cut["BN"]),)](
        x, codes, scales, out, gain, eps, in_dim, out_dim, BN=cut["BN"], BK=cut["BK"], EACH=16, SCALED=True,
        NORM=norm is not None, RESIDUAL=residual is not None, GATED=gated, PDL=overlap,
        STAGES=cut["stages"], num_warps=cut["warps"], **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


def int8_cpu(x: Tensor, weight: Coded) -> Tensor:
    """x [rows, in] of float32 times int8 codes, on a CPU → [rows, out] float32."""
    return torch._weight_int8pack_mm(x.bfloat16(), weight.codes, weight.scales.bfloat16()).float()


_IMPLEMENTATIONS: Mapping[str, object] = {"torch": quantised_linear_ref, "triton": quantised_rows_triton}


def quantised_linear(
    x: Tensor,
    weight: Coded,
    *,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    lora: Folded | None = None,
) -> Tensor:
    """x [rows, in] times weight [out, in] → [rows, out]; onto a residual, in place; gated: [rows, out / 2].

    arrivals: int32 zeros, as skinny.linear's. Any number of rows. lora: what the adapters add, of this very x, which is
    normed already; `takes_lora` must have said so.
    """
    assert x.shape[-1] == weight.codes.shape[1], (x.shape, weight.codes.shape)
    assert x.stride(-1) == 1, x.stride()
    assert weight.codes.is_contiguous(), weight.codes.stride()
    assert residual is None or (not gated and residual.shape == (x.shape[0], weight.codes.shape[0])), residual
    assert residual is None or residual.stride(-1) == 1, residual.stride()
    if lora is not None:
        assert norm is None, "the adapters have read x already"
        return quantised_lora_triton(x, weight, lora, residual, gated, arrivals)
    if backend(x, _IMPLEMENTATIONS) == "triton" and x.shape[0] <= MAX_ROWS:
        if x.shape[0] == 1:
            return quantised_one_row_triton(x, weight, residual, norm, gated)
        x = x if norm is None else rms_norm(x, *norm)
        multiply = quantised_words_triton if takes_words(x) else quantised_rows_triton
        return multiply(x, weight, residual, gated, arrivals)
    x = x if norm is None else rms_norm(x, *norm)
    if suits_cpu(x, weight):
        y = int8_cpu(x, weight)
        return residual.add_(y) if residual is not None else silu_mul(y) if gated else y
    matrix = decode(weight, x.dtype).t()
    if residual is not None:
        return residual.addmm_(x, matrix)
    y = torch.mm(x, matrix)
    return silu_mul(y) if gated else y


def takes_lora(x: Tensor, weight: Coded, factors: SlotFactors) -> bool:
    """Whether `quantised_linear` adds these adapters' share to x [rows, in] times weight."""
    return backend(x, _IMPLEMENTATIONS) == "triton" and fits(x, weight, factors)


def suits_cpu(x: Tensor, weight: Coded) -> bool:
    """Whether torch's weight-only product is for these. It reads beyond rows whose length is odd."""
    is_int8 = weight.codes.dtype == torch.int8 and x.dtype == torch.float32
    return x.device.type == "cpu" and is_int8 and x.shape[0] <= MAX_CPU_ROWS and x.shape[1] % 32 == 0
