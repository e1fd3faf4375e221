"""Weights in one byte each: a code times its output's scale (weight-only quantisation, symmetric, one scale a row).

    W[n, k] ≈ scales[n] · codes[n, k]        scales[n] = max_k |W[n, k]| / largest code

    int8   codes -127 … 127; the error of a weight is at most half its row's scale
    fp8    codes e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), up to 448: 3 bits of mantissa; the error is at most
           2⁻⁴ of the weight, or of its row's scale 2⁻¹⁰

Scales are fp32 that bfloat16 holds exactly, so that products in any dtype multiply by the same number. Codes are exact
in bfloat16 and float16: only decoding, or the sum, rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import cdiv, tl, triton

Kind = Literal["fp8", "int8"]
CODES: Mapping[Kind, tuple[torch.dtype, float]] = MappingProxyType(
    {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
)
"""Dtype of the codes, and the largest of them."""


class Coded(NamedTuple):
    """codes [out, in] of one byte, rows contiguous; scales [out] float32."""

    codes: Tensor
    scales: Tensor


def empty_coded(kind: Kind, out_dim: int, in_dim: int, device: torch.device) -> Coded:
    """Room for a matrix; it holds nothing yet."""
    codes = torch.empty(out_dim, in_dim, dtype=CODES[kind][0], device=device)
    return Coded(codes, torch.empty(out_dim, dtype=torch.float32, device=device))


def encode(weight: Tensor, into: Coded) -> None:
    """Quantise `weight` [out, in] of any dtype into codes and scales, where those lie. Rows do not depend on others."""
    largest = next(most for dtype, most in CODES.values() if dtype == into.codes.dtype)
    wide = weight.to(into.codes.device, torch.float32)
    # A row of zeros has a scale too: the smallest, of zeros.
    scales = (wide.abs().amax(1) / largest).clamp_min_(torch.finfo(torch.float32).tiny).bfloat16().float()
    codes = wide.div_(scales[:, None]) if wide is not weight else wide / scales[:, None]
    into.scales.copy_(scales)
    if not into.codes.is_floating_point():
        codes.round_()
    into.codes.copy_(codes.clamp_(-largest, largest))


def decode_ref(coded: Coded, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (coded.codes.to(wide) * coded.scales[:, None]).to(dtype)


@triton.jit
def _decode_kernel(codes, scales, out, out_dim, in_dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [ROWS, COLUMNS] a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, inside = row.to(tl.int64) * in_dim + column, (row < out_dim) & (column < in_dim)
    value = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scales + row, mask=row < out_dim, other=0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def decode_triton(coded: Coded, dtype: torch.dtype) -> Tensor:
    codes, scales = coded
    (out_dim, in_dim), out = codes.shape, torch.empty(codes.shape, dtype=dtype, device=codes.device)
    grid = (cdiv(out_dim, 8), cdiv(in_dim, 512))
    _decode_kernel[grid](codes, scales, out, out_dim, in_dim, ROWS=8, COLUMNS=512)
    return out


def decode(coded: Coded, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that codes and scales stand for, rounded to `dtype` (float64: exactly)."""
    if dtype != torch.float64 and backend(coded.scales, ("torch", "triton")) == "triton":
        return decode_triton(coded, dtype)
    return decode_ref(coded, dtype)
