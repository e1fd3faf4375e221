"""Products of a few rows with a large matrix, as decoding makes them: y = x Wᵀ, with the neighbours taken in.

    plain     y = x Wᵀ                                 x: [rows, in]; W: [out, in], rows contiguous; y: [rows, out]
    residual  y = residual + x Wᵀ                      residual: [rows, out], overwritten with y
    norm      y = rsqrt(mean(x²) + eps) (x * g) Wᵀ     RMSNorm first (g: [in]); its factor is one number a row
    gated     y = silu(x Wgᵀ) * (x Wuᵀ)                W = [Wg; Wu]: [2 out, in]; SwiGLU (Shazeer 2020); y: [rows, out]
    lora      x Wᵀ + Σ s·B wherever x Wᵀ stands        s = x Aᵀ; of `GroupedLora.fold`, where `takes_lora`

For few rows the time is that of reading W: 2 bytes an element at the memory's speed. So what matters is that W streams
without a pause: enough bytes in flight, and no gap between two kernels. For the second, a kernel starts while its
predecessor still runs (programmatic dependent launch) and loads its first part of W before it waits for the
predecessor, whose results are all it depends on. Hence the rule: W must not have been written in the same step.

One row is a matrix-vector product of fp32 multiplications; more rows, or one with adapters, go through Hopper's tensor
cores (skinny.hopper), with the norm as a kernel of its own, or shared with the product before (skinny.ahead). Sums are
fp32 in a fixed order. W in one byte an element: skinny.quantised.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specserve_kernels.activation import silu_mul_ref
from specserve_kernels.dispatch import backend
from specserve_kernels.language import tl, triton
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import SlotFactors
from specserve_kernels.norm import rms_norm, rms_norm_ref
from specserve_kernels.overlap import overlaps, wait
from specserve_kernels.skinny import hopper as skinny_hopper
from specserve_kernels.skinny.ahead import Ahead, empty_ahead, factors_ref, leave_ref


@triton.jit
def weight_rows(index, program, out_dim, BN: tl.constexpr, GATED: tl.constexpr):
    """The program's rows of W; gated: a row of Wg and its partner of Wu in turn. Beyond the end: the last."""
    if GATED:
        rows = tl.minimum(program * (BN // 2) + index // 2, out_dim - 1) + (index % 2) * out_dim
    else:
        rows = tl.minimum(program * BN + index, out_dim - 1)
    return rows


@triton.jit
def _one_row_part(weight, x, gain, columns, in_dim,
                  BN: tl.constexpr, BK: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """W [BN, BK] times x, summed over EACH columns, which one thread holds: [BN, BK / EACH]; so x²: [1, BK / EACH]."""
    inside = columns < in_dim
    value = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    squares = tl.zeros((1, BK // EACH), tl.float32)
    if NORM:
        squares = tl.sum(tl.reshape(value * value, (1, BK // EACH, EACH)), 2)
        value *= tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(weight.to(tl.float32) * value, (BN, BK // EACH, EACH)), 2), squares


@triton.jit
def one_row_kernel(
    x, w, scales, out, gain, eps, in_dim, out_dim,
    BN: tl.constexpr, BK: tl.constexpr, EACH: tl.constexpr, SCALED: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program p: BN rows of W times x [in]; the first BK columns are loaded while the kernels before still run.
    EACH: columns that a thread loads at once, 16 bytes. SCALED: each row of W stands for that times its scale."""
    program = tl.program_id(0)
    columns = tl.arange(0, BK)[None, :]
    rows = weight_rows(tl.arange(0, BN), program, out_dim, BN, GATED)
    tile = w + rows.to(tl.int64)[:, None] * in_dim + columns
    first = tl.load(tile, mask=columns < in_dim, other=0.0)
    if SCALED:
        scale = tl.load(scales + rows)
    wait(PDL)
    sums, squares = _one_row_part(first, x, gain, columns, in_dim, BN, BK, EACH, NORM)
    for start in tl.range(BK, in_dim, BK, num_stages=STAGES):
        weight = tl.load(tile + start, mask=columns + start < in_dim, other=0.0)
        more, more_squares = _one_row_part(weight, x, gain, columns + start, in_dim, BN, BK, EACH, NORM)
        sums += more
        squares += more_squares
    y = tl.sum(sums, 1)
    if SCALED:
        y *= scale
    if NORM:
        y *= tl.rsqrt(tl.sum(squares) / in_dim + tl.load(eps))
    if GATED:
        gate, up = tl.split(tl.reshape(y, (BN // 2, 2)))
        index = program * (BN // 2) + tl.arange(0, BN // 2)
        y = gate * tl.sigmoid(gate) * up
    else:
        index = program * BN + tl.arange(0, BN)
    if RESIDUAL:
        y += tl.load(out + index, mask=index < out_dim, other=0.0).to(tl.float32)
    tl.store(out + index, y.to(out.dtype.element_ty), mask=index < out_dim)


Norm = tuple[Tensor, Tensor]
"""RMSNorm before the product: its weight [in] and its eps []."""

Cut = Mapping[str, int]
"""How a product is cut: BN rows of W by BK columns at once, stages of loads in flight, warps."""


def skinny_linear_ref(x: Tensor, weight: Tensor, residual: Tensor | None, norm: Norm | None, gated: bool) -> Tensor:
    x = x if norm is None else rms_norm_ref(x, *norm)
    if residual is not None:
        return residual.addmm_(x, weight.t())
    y = torch.mm(x, weight.t())
    return silu_mul_ref(y) if gated else y


def choose_cut(out_dim: int) -> Cut:
    """The cut for one row and W [out, in]: W's shares must occupy every multiprocessor several times over."""
    return {"BN": 8 if out_dim > 4096 else 4, "BK": 1024, "stages": 2, "warps": 4}


def skinny_linear_triton(
    x: Tensor, weight: Tensor, residual: Tensor | None, norm: Norm | None, gated: bool, cut: Cut | None = None
) -> Tensor:
    """x: [1, in]."""
    rows, in_dim = x.shape
    assert rows == 1, rows
    out_dim = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty(rows, out_dim) if residual is None else residual
    cut = choose_cut(weight.shape[0]) if cut is None else cut
    overlap = overlaps(x)
    gain, eps = (x, x) if norm is None else norm
    one_row_kernel[(triton.cdiv(weight.shape[0], cut["BN"]),)](
        x, weight, weight, out, gain, eps, in_dim, out_dim, BN=cut["BN"], BK=cut["BK"], EACH=8, SCALED=False,
        NORM=norm is not None, RESIDUAL=residual is not None, GATED=gated, PDL=overlap,
        STAGES=cut["stages"], num_warps=cut["warps"],
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out


_IMPLEMENTATIONS = {"torch": skinny_linear_ref, "triton": skinny_linear_triton}
MAX_ROWS = skinny_hopper.MOST_ROWS
"""Beyond so many rows the library's product is the better one …"""
_MAX_ROWS_OF_LARGE, _LARGE = 32, 32768
"""… beyond so many already where W has more outputs than that: a vocabulary's."""
MOST_AHEAD = 64
"""Rows up to which norms are shared: with more, the sums of squares, which each program adds up, cost more than a
kernel for the norm."""
_MAX_TILES = 4096  # of 64 rows of W: more than any vocabulary has


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    lora: Folded | None = None,
) -> Tensor:
    """x [rows, in] times weight [out, in] → [rows, out]; onto a residual, in place; gated: [rows, out / 2].

    arrivals: int32 zeros, which all products on a stream may share; with it, more of the GPU works at a small W.
    lora: what the adapters add, of this very x, which is normed already; `takes_lora` must have said so.
    """
    assert x.shape[-1] == weight.shape[1], (x.shape, weight.shape)
    assert x.stride(-1) == 1, x.stride()
    assert weight.is_contiguous(), weight.stride()
    assert residual is None or (not gated and residual.shape == (x.shape[0], weight.shape[0])), weight.shape
    assert residual is None or residual.stride(-1) == 1, residual.stride()
    if lora is not None:
        assert norm is None, "the adapters have read x already"
        return skinny_hopper.skinny_linear_hopper(x, weight, residual, gated, arrivals, lora=lora)
    is_large = not gated and weight.shape[0] > _LARGE
    if not is_skinny(x) or (is_large and x.shape[0] > _MAX_ROWS_OF_LARGE):
        return skinny_linear_ref(x, weight, residual, norm, gated)
    if x.shape[0] == 1:
        return skinny_linear_triton(x, weight, residual, norm, gated)
    x = x if norm is None else rms_norm(x, *norm)
    if not skinny_hopper.takes(x, weight):
        return skinny_linear_ref(x, weight, residual, None, gated)
    return skinny_hopper.skinny_linear_hopper(x, weight, residual, gated, arrivals)


def add_skinny_linear(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    *,
    arrivals: Tensor | None = None,
    lora: Folded | None = None,
) -> Ahead:
    """residual [rows, out] += x Wᵀ, in place; what that leaves for a norm with weight `gain` [out]. Where
    `leaves_ahead`."""
    if backend(x, _IMPLEMENTATIONS) == "torch":
        assert lora is None, "adapters within a product are a GPU's"
        return leave_ref(residual.addmm_(x, weight.t()), gain)
    ahead = empty_ahead(residual)
    skinny_hopper.skinny_linear_hopper(x, weight, residual, False, arrivals, lora=lora, leaves=(gain, ahead))
    return ahead


def skinny_linear_ahead(
    ahead: Ahead,
    eps: Tensor,
    weight: Tensor,
    *,
    gated: bool = False,
    arrivals: Tensor | None = None,
    lora: Folded | None = None,
) -> Tensor:
    """`skinny_linear` of what `ahead` was left of, normed. lora: of ahead.scaled. Where `takes_ahead`."""
    if backend(ahead.scaled, _IMPLEMENTATIONS) == "torch":
        assert lora is None, "adapters within a product are a GPU's"
        y = torch.mm(ahead.scaled, weight.t()) * factors_ref(ahead, eps).to(weight.dtype)
        return silu_mul_ref(y) if gated else y
    return skinny_hopper.skinny_linear_hopper(
        ahead.scaled, weight, None, gated, arrivals, lora=lora, normed=(ahead, eps)
    )


def leaves_ahead(x: Tensor, weight: Tensor, lora: Folded | None) -> bool:
    """Whether `add_skinny_linear` is for x [rows, in] and weight: not for one row, whose kernel norms x itself, unless
    it has adapters; nor in float16, where h * g might overflow."""
    few = (lora is not None or x.shape[0] > 1) and x.shape[0] <= MOST_AHEAD
    return few and x.dtype == torch.bfloat16 and is_skinny(x) and skinny_hopper.takes(x, weight)


def takes_ahead(ahead: Ahead, weight: Tensor) -> bool:
    """Whether `skinny_linear_ahead` is for such a weight."""
    return is_skinny(ahead.scaled) and skinny_hopper.takes(ahead.scaled, weight)


def arrivals(device: torch.device) -> Tensor:
    """What `skinny_linear` counts its programs' arrivals in: int32 zeros, and zeros again after every product."""
    return torch.zeros(_MAX_TILES, dtype=torch.int32, device=device)


def takes_lora(x: Tensor, weight: Tensor, factors: SlotFactors) -> bool:
    """Whether `skinny_linear` adds these adapters' share to x [rows, in] times weight [out, in]."""
    return is_skinny(x) and skinny_hopper.takes_lora(x, weight, factors)


def is_skinny(x: Tensor) -> bool:
    """Whether these kernels, and not the library's, should multiply x [rows, in]."""
    rows = x.shape[0]
    return rows <= MAX_ROWS and backend(x, _IMPLEMENTATIONS) == "triton" and (rows == 1 or skinny_hopper.suits(x))
