"""The kernel of skinny.quantised for two to eight rows of bfloat16: codes from memory straight into the tensor cores'
operands, four in a word, without shared memory.

In the operands of an mma a thread holds, of every 16 columns, four that need not be neighbours: which column of W meets
which of x is all that matters. So a thread loads 16 neighbouring codes of a row of W, 16 neighbours of x for them, and
takes them for the columns that it holds of four mma's. No word moves between threads, and of W as many are on their way
as registers hold. The warps part `in` among them, 64 columns each, and their sums are added in shared memory. Programs
take tiles of W and parts of `in` as in quantised_rows.

    fp8    s eeee mmm → bfloat16 s 0000eeee mmm0000: the code times 2⁻¹²⁰, exactly, subnormal codes too; sums are
           multiplied by 2¹²⁰ at the end. They lose bits where all of x is below 2⁻²⁰.
    int8   (128 + low 7 bits) − 128 or 256 by the sign, in bfloat16, which holds all of these

Tensor cores keep subnormal operands and sums (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import overlaps, wait
from specserve_kernels.skinny.codes import Coded
from specserve_kernels.skinny.linear import weight_rows
from specserve_kernels.skinny.quantised_rows import MULTIPROCESSORS, finish, part_of

MOST_ROWS = 8
"""Rows of x: what the tensor cores' narrow operand holds."""
_TOKENS = tl.constexpr(MOST_ROWS)
_BN = tl.constexpr(32)  # rows of W in a tile
_WAYS = tl.constexpr(4)  # warps
_WIDTH = tl.constexpr(4 * 64)  # columns that they take at once
_AHEAD = tl.constexpr(4)  # tiles of that width on their way

_FP8_SCALE = tl.constexpr(2.0**120)
_FP8_ASM = tl.constexpr(
    # A byte with its sign in all bits above it, shifted: masking leaves sign, exponent and mantissa in their places.
    """{ .reg .b32 a, b;
    prmt.b32 a, $4, 0, 0x9180; prmt.b32 b, $4, 0, 0xB3A2;
    shl.b32 a, a, 4; shl.b32 b, b, 4;
    and.b32 a, a, 0x87F087F0; and.b32 b, b, 0x87F087F0;
    mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)
_INT8_ASM = tl.constexpr(
    # a − c as c times −1 plus a, which is exact: only Hopper and later subtract two bfloat16 at once.
    """{ .reg .b32 a, b, c, d, n;
    mov.b32 n, 0xBF80BF80;
    prmt.b32 a, $4, 0x43, 0x4140; prmt.b32 b, $4, 0x43, 0x4342;
    and.b32 c, a, 0x43804380; and.b32 d, b, 0x43804380;
    and.b32 a, a, 0x437F437F; and.b32 b, b, 0x437F437F;
    fma.rn.bf16x2 a, c, n, a; fma.rn.bf16x2 b, d, n, b;
    mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }"""
)


@triton.jit
def _widen_byte(words, BYTE: tl.constexpr, FP8: tl.constexpr):
    """The words' code at BYTE as bfloat16: what the assembly does, in Triton."""
    code = (words >> (8 * BYTE)) & 0xFF
    if FP8:
        wide = (((code & 0x80) << 8) | ((code & 0x7F) << 4)).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        wide = ((code ^ 0x80) - 0x80).to(tl.float32).to(tl.bfloat16)
    return wide


@triton.jit
def widen(words, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """int32 [...] of four codes each → bfloat16 [..., 2, 2]; fp8 times 2⁻¹²⁰. NATIVE: as NVIDIA's assembly."""
    if NATIVE:
        one, two, three, four = tl.inline_asm_elementwise(
            _FP8_ASM if FP8 else _INT8_ASM, "=h,=h,=h,=h,r", [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        one, two = _widen_byte(words, 0, FP8), _widen_byte(words, 1, FP8)
        three, four = _widen_byte(words, 2, FP8), _widen_byte(words, 3, FP8)
    return tl.join(tl.join(one, three), tl.join(two, four))


@triton.jit
def _left_operand(words, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Words [8, _WAYS, _BN / 8, 16] → W [_WAYS, _BN, 64] in the operand's order of columns."""
    wide = tl.reshape(widen(words, FP8, NATIVE), (8, _WAYS, _BN // 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(wide, (1, 2, 0, 4, 6, 3, 5, 7)), (_WAYS, _BN, 64))


@triton.jit
def _right_operand(x, start, end, count, x_stride, EVEN: tl.constexpr):
    """x [_WAYS, 64, _TOKENS], columns in the same order; zeros beyond the end."""
    column = start + (
        tl.arange(0, 4)[:, None, None, None, None] * 16
        + tl.arange(0, _WAYS)[None, None, :, None, None] * 64
        + tl.arange(0, 2)[None, None, None, :, None] * 8
        + tl.arange(0, 8)[None, None, None, None, :]
    )
    row = tl.minimum(tl.arange(0, _TOKENS), count - 1)[None, :, None, None, None]
    at = x + row.to(tl.int64) * x_stride + column
    values = tl.load(at) if EVEN else tl.load(at, mask=(column < end) & (row >= 0), other=0.0)
    values = tl.reshape(values, (4, _TOKENS, _WAYS, 2, 2, 2, 2))
    return tl.reshape(tl.permute(values, (2, 3, 5, 0, 4, 6, 1)), (_WAYS, 64, _TOKENS))


@triton.jit
def _words(w, rows, start, end, in_dim):
    """Words [8, _WAYS, _BN / 8, 16] of W's rows from column `start` on; anything beyond the end, where x is zero."""
    word = start // 4 + (tl.arange(0, _WAYS)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :])
    at = w.to(tl.pointer_type(tl.int32)) + (rows.to(tl.int64) * (in_dim // 4) + word)
    return tl.load(at, mask=word < end // 4, cache_modifier=".cg")


@triton.jit
def _words_ahead(w, rows, begin, end, in_dim):
    """A part's first _AHEAD tiles of W."""
    words = ()
    for i in tl.static_range(_AHEAD):
        words += (_words(w, rows, begin + i * _WIDTH, end, in_dim),)  # type: ignore[assignment]
    return words


@triton.jit
def _multiply(words, x, w, rows, begin, end, count, in_dim, x_stride,
              EVEN: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """A part's sums [_BN, _TOKENS] of codes times x, after its first tiles of `words` came. EVEN: _AHEAD tiles at a
    time end where the part ends."""
    sums = tl.zeros((_WAYS, _BN, _TOKENS), tl.float32)
    for start in tl.range(begin, end, _WIDTH * _AHEAD, num_stages=1):
        for i in tl.static_range(_AHEAD):
            at = start + i * _WIDTH
            left = _left_operand(words[0], FP8, NATIVE)
            words = words[1:]
            words += (_words(w, rows, at + _WIDTH * _AHEAD, end, in_dim),)
            sums = tl.dot(left, _right_operand(x, at, end, count, x_stride, EVEN), sums)
    total = tl.sum(sums, 0)
    return total * _FP8_SCALE if FP8 else total


@relaunched
@triton.jit(do_not_specialize=["count"])
def _words_kernel(
    x, w, scales, out, workspace, arrivals, count, in_dim, out_dim, x_stride, out_stride, parts_stride,
    SPLITS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, FP8: tl.constexpr,
    NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program p: part p % SPLITS of tile p // SPLITS of W. parts_stride: fp32 of a part."""
    tile, part = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    begin, end = part_of(part, in_dim, _WIDTH, SPLITS)
    index = tl.arange(0, 8)[:, None, None, None] + tl.arange(0, _BN // 8)[None, None, :, None] * 8
    rows = weight_rows(index, tile, out_dim, _BN, GATED)
    words = _words_ahead(w, rows, begin, end, in_dim)
    scale = tl.load(scales + weight_rows(tl.arange(0, _BN), tile, out_dim, _BN, GATED))
    wait(PDL)
    sums = _multiply(words, x, w, rows, begin, end, count, in_dim, x_stride, EVEN, FP8, NATIVE)
    finish(sums, scale, out, workspace, arrivals, tile, part, 0, tl.arange(0, _TOKENS), count, out_dim, out_stride,
           parts_stride, SPLITS, GATED, RESIDUAL)  # fmt: skip


def choose_splits(out_rows: int, in_dim: int) -> int:
    """Parts along `in`: more until every multiprocessor has three programs, as long as a part is no shorter than what
    is on its way at once."""
    tiles, splits = cdiv(out_rows, _BN.value), 1
    while splits < 8 and tiles * splits < 3 * MULTIPROCESSORS and in_dim >= 2 * splits * _WIDTH.value * _AHEAD.value:
        splits *= 2
    return splits


def takes_words(x: Tensor) -> bool:
    """Whether this kernel is for x [rows, in]: few rows of bfloat16, as long as whole words of codes."""
    return x.shape[0] <= MOST_ROWS and x.dtype == torch.bfloat16 and x.shape[1] % 4 == 0


def quantised_words_triton(
    x: Tensor,
    weight: Coded,
    residual: Tensor | None = None,
    gated: bool = False,
    arrivals: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """quantised_rows_triton of x [rows, in], of which `takes_words` must hold. splits: other than chosen."""
    (rows, in_dim), (codes, scales) = x.shape, weight
    assert takes_words(x), (x.shape, x.dtype)
    out_dim = codes.shape[0] // 2 if gated else codes.shape[0]
    out = x.new_empty(rows, out_dim) if residual is None else residual
    splits = 1 if arrivals is None else splits or choose_splits(codes.shape[0], in_dim)
    tiles = cdiv(codes.shape[0], _BN.value)
    part = tiles * _BN.value * MOST_ROWS
    assert splits == 1 or (arrivals is not None and arrivals.numel() >= tiles), tiles
    workspace = scales if splits == 1 else scales.new_empty(splits * part)
    overlap = overlaps(x)
    _words_kernel[(tiles * splits,)](
        x, codes, scales, out, workspace, scales if arrivals is None else arrivals, rows, in_dim, out_dim,
        x.stride(0), out.stride(0), part,
        SPLITS=splits, GATED=gated, RESIDUAL=residual is not None,
        EVEN=in_dim % (_WIDTH.value * _AHEAD.value * splits) == 0, FP8=codes.dtype == torch.float8_e4m3fn,
        NATIVE=x.is_cuda and torch.version.hip is None, PDL=overlap,
        num_warps=_WAYS.value, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
