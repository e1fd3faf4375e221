"""The kernel of skinny.quantised for several rows: tiles of codes are widened in registers and multiplied by tensor
cores.

A program takes BN rows of W (gated: BN / 2 of Wg with their partners of Wu), one of SPLITS parts of `in` and TOKENS
rows of x. W is the left operand, whose rows fill the instruction, xᵀ the narrow one. The first tile of W is loaded
while the kernels before still run (see overlap), the others through a ring of STAGES in shared memory.

With parts, each stores its fp32 sums in a workspace [SPLITS, tiles of x, tiles of W, BN, TOKENS]; the one to arrive
last adds them in the order of the parts, so that the result does not depend on who was last, and sets its counter of
arrivals back to 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.activation import gated as gate_of
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import overlaps, wait
from specserve_kernels.skinny.codes import Coded
from specserve_kernels.skinny.linear import Cut, weight_rows

MULTIPROCESSORS = 132


@triton.jit
def part_of(part, in_dim, BK: tl.constexpr, SPLITS: tl.constexpr):
    """Where along `in` a part begins and ends."""
    width = tl.cdiv(tl.cdiv(in_dim, BK), SPLITS) * BK
    begin = part * width
    return begin, tl.minimum(begin + width, in_dim)


@triton.jit
def first_codes(w, rows, begin, end, in_dim, BK: tl.constexpr):
    """A part's first tile of W [BN, BK]."""
    k = begin + tl.arange(0, BK)[None, :]
    return tl.load(w + rows.to(tl.int64)[:, None] * in_dim + k, mask=k < end, other=0.0)


@triton.jit
def multiply(codes, x, w, rows, token, begin, end, count, in_dim, x_stride,
             BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """A part's sums [BN, TOKENS] of codes times x, after its first tile's `codes` came."""
    kind: tl.constexpr = x.dtype.element_ty
    k = tl.arange(0, BK)
    w_at = w + rows.to(tl.int64)[:, None] * in_dim + k[None, :]
    x_at = x + tl.minimum(token, count - 1).to(tl.int64)[None, :] * x_stride + k[:, None]
    values = tl.load(x_at + begin, mask=k[:, None] + begin < end, other=0.0)
    sums = tl.dot(codes.to(tl.float32).to(kind), values, input_precision=PRECISION)
    for start in tl.range(begin + BK, end, BK, num_stages=STAGES):
        codes = tl.load(w_at + start, mask=k[None, :] + start < end, other=0.0)
        values = tl.load(x_at + start, mask=k[:, None] + start < end, other=0.0)
        sums = tl.dot(codes.to(tl.float32).to(kind), values, sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_parts(sums, workspace, arrival, part, parts_stride, SPLITS: tl.constexpr):
    """Store this part's sums [BN, TOKENS]. The last to arrive: all parts' sum, and True."""
    BN: tl.constexpr = sums.shape[0]
    TOKENS: tl.constexpr = sums.shape[1]
    at = workspace + tl.arange(0, BN)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    tl.store(at + part * parts_stride, sums)
    tl.debug_barrier()  # all threads' sums are written before one of them says so
    last = tl.atomic_add(arrival, 1) == SPLITS - 1
    if last:
        tl.store(arrival, 0)  # ready for the next product
        # Other programs wrote these: past the first-level cache, which may hold what was there before.
        sums = tl.load(at, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            sums += tl.load(at + other * parts_stride, cache_modifier=".cg")
    return sums, last


@triton.jit
def write(y, out, tile, token, count, out_dim, out_stride,
          BN: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """What follows on the product [BN, TOKENS]."""
    if GATED:
        gate, up = tl.split(tl.trans(tl.reshape(y, (BN // 2, 2, TOKENS)), 0, 2, 1))
        y = gate_of(gate, up)
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
    else:
        n = tile * BN + tl.arange(0, BN)
    at = out + token.to(tl.int64)[None, :] * out_stride + n[:, None]
    inside = (n[:, None] < out_dim) & (token[None, :] < count)
    if RESIDUAL:
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def finish(sums, scale, out, workspace, arrivals, tile, part, token_tile, token, count, out_dim, out_stride,
           parts_stride, SPLITS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr):  # fmt: skip
    """Write a part's sums [BN, TOKENS] times W's scales [BN]; of several parts all parts' sum, by the last."""
    BN: tl.constexpr = sums.shape[0]
    TOKENS: tl.constexpr = sums.shape[1]
    last = True
    if SPLITS > 1:
        place = token_tile * (tl.num_programs(0) // SPLITS) + tile
        share = workspace + place.to(tl.int64) * (BN * TOKENS)
        sums, last = add_parts(sums, share, arrivals + place, part, parts_stride, SPLITS)
    if last:
        write(sums * scale[:, None], out, tile, token, count, out_dim, out_stride, BN, TOKENS, GATED, RESIDUAL)


@relaunched
@triton.jit(do_not_specialize=["count"])
def _rows_kernel(
    x, w, scales, out, workspace, arrivals, count, in_dim, out_dim, x_stride, out_stride, parts_stride,
    BN: tl.constexpr, BK: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (p, q): part p % SPLITS of tile p // SPLITS of W, tile q of x. parts_stride: fp32 of a part."""
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    rows = weight_rows(tl.arange(0, BN), tile, out_dim, BN, GATED)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin, end = part_of(part, in_dim, BK, SPLITS)
    codes = first_codes(w, rows, begin, end, in_dim, BK)
    scale = tl.load(scales + rows)
    wait(PDL)
    sums = multiply(codes, x, w, rows, token, begin, end, count, in_dim, x_stride, BK, STAGES, PRECISION)
    finish(sums, scale, out, workspace, arrivals, tile, part, tl.program_id(1), token, count, out_dim, out_stride,
           parts_stride, SPLITS, GATED, RESIDUAL)  # fmt: skip


def choose_cut(rows: int, out_rows: int, in_dim: int) -> Cut:
    """Rows of W and columns of a tile, rows of x in it, parts along `in`: a W of few tiles is parted until every
    multiprocessor has two programs, of at least 512 bytes a row of W."""
    tokens = min(max(16, power_of_2(rows)), 128)
    wide = 128 if out_rows > 64 * 4 * MULTIPROCESSORS else 64
    tiles = cdiv(out_rows, wide) * cdiv(rows, tokens)
    splits = 1
    while splits < 8 and tiles * splits < 2 * MULTIPROCESSORS and in_dim >= 1024 * splits:
        splits *= 2
    return {"BN": wide, "BK": 128, "TOKENS": tokens, "SPLITS": splits, "STAGES": 4 if tokens < 64 else 3, "warps": 4}


def quantised_rows_triton(
    x: Tensor,
    weight: Coded,
    residual: Tensor | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """x [rows, in] times codes and scales → [rows, out], or onto a residual. arrivals: int32 zeros, one a tile or more,
    of which kernels on one stream may share one tensor; without it `in` is not parted."""
    (rows, in_dim), (codes, scales) = x.shape, weight
    out_dim = codes.shape[0] // 2 if gated else codes.shape[0]
    out = x.new_empty(rows, out_dim) if residual is None else residual
    cut = choose_cut(rows, codes.shape[0], in_dim) if cut is None else cut
    splits = 1 if arrivals is None else cut["SPLITS"]
    tiles, tokens = cdiv(codes.shape[0], cut["BN"]), cdiv(rows, cut["TOKENS"])
    part = tiles * tokens * cut["BN"] * cut["TOKENS"]
    assert splits == 1 or (arrivals is not None and arrivals.numel() >= tiles * tokens), (tiles, tokens)
    workspace = scales if splits == 1 else torch.empty(splits * part, dtype=torch.float32, device=x.device)
    overlap = overlaps(x)
    _rows_kernel[(tiles * splits, tokens)](
        x, codes, scales, out, workspace, scales if arrivals is None else arrivals, rows, in_dim, out_dim,
        x.stride(0), out.stride(0), part,
        BN=cut["BN"], BK=cut["BK"], TOKENS=cut["TOKENS"], SPLITS=splits, STAGES=cut["STAGES"], GATED=gated,
        RESIDUAL=residual is not None, PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PDL=overlap,
        num_warps=cut["warps"], **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
