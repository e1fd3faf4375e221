"""Codes from memory straight into the tensor cores' operands: four in a word, without shared memory.

In the operands of an mma a thread holds, of every 16 columns, four that need not be neighbours: which column of W meets
which of x is all that matters. So a thread loads 16 neighbouring codes of a row of W, 16 neighbours of x for them, and
takes them for the columns that it holds of four mma's. No word moves between threads, and of W as many are on their way
as registers hold. The warps part `in` among them, 64 columns each, and their sums are added in shared memory.

    fp8    s eeee mmm → bfloat16 s 0000eeee mmm0000: the code times 2⁻¹²⁰, exactly, subnormal codes too; sums are
           multiplied by 2¹²⁰ at the end. They lose bits where all of x is below 2⁻²⁰.
    int8   (128 + low 7 bits) − 128 or 256 by the sign, in bfloat16, which holds all of these

Tensor cores keep subnormal operands and sums (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores).
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

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
    """{ .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0x43, 0x4140; prmt.b32 b, $4, 0x43, 0x4342;
    and.b32 c, a, 0x43804380; and.b32 d, b, 0x43804380;
    and.b32 a, a, 0x437F437F; and.b32 b, b, 0x437F437F;
    sub.rn.bf16x2 a, a, c; sub.rn.bf16x2 b, b, d;
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
def _left_operand(words, WAYS: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Words [8, WAYS, BN / 8, 16] → W [WAYS, BN, 64] in the operand's order of columns."""
    wide = tl.reshape(widen(words, FP8, NATIVE), (8, WAYS, BN // 8, 4, 2, 2, 2, 2))
    return tl.reshape(tl.permute(wide, (1, 2, 0, 4, 6, 3, 5, 7)), (WAYS, BN, 64))


@triton.jit
def _right_operand(x, gain, token, start, end, count, x_stride, WAYS: tl.constexpr, TOKENS: tl.constexpr,
                   NORM: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """x [WAYS, 64, TOKENS], columns in the same order, from `token` on; zeros beyond the end. NORM: times its gain."""
    column = start + (
        tl.arange(0, 4)[:, None, None, None, None, None] * 16
        + tl.arange(0, WAYS)[None, None, :, None, None, None] * 64
        + tl.arange(0, 2)[None, None, None, :, None, None] * 8
        + tl.arange(0, 8)[None, None, None, None, None, :]
    )
    row = token + (
        tl.arange(0, 8)[None, :, None, None, None, None]
        + tl.arange(0, TOKENS // 8)[None, None, None, None, :, None] * 8
    )
    at = x + tl.minimum(row, count - 1).to(tl.int64) * x_stride + column
    values = tl.load(at) if EVEN else tl.load(at, mask=(column < end) & (row >= 0), other=0.0)
    if NORM:
        # The gain where x is, row for row: one tensor's layout suits the other.
        gains = tl.load(gain + column + row * 0, mask=(column < end) & (row >= 0), other=0.0)
        values = _times(values, gains, NATIVE)
    values = tl.reshape(values, (4, 8, WAYS, 2, TOKENS // 8, 2, 2, 2))
    return tl.reshape(tl.permute(values, (2, 3, 6, 0, 5, 7, 4, 1)), (WAYS, 64, TOKENS))


@triton.jit
def _times(a, b, NATIVE: tl.constexpr):
    """a b of bfloat16, rounded once."""
    if NATIVE:
        return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.bfloat16,
                                         is_pure=True, pack=2)  # fmt: skip
    else:
        return (a.to(tl.float32) * b.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def tile_index(BN: tl.constexpr):
    """Which row of a tile of W a word belongs to [8, 1, BN / 8, 1]."""
    return tl.arange(0, 8)[:, None, None, None] + tl.arange(0, BN // 8)[None, None, :, None] * 8


@triton.jit
def _words(w, rows, start, end, in_dim, WAYS: tl.constexpr):
    """Words [8, WAYS, BN / 8, 16] of W's rows from column `start` on; anything beyond the end, where x is zero."""
    word = start // 4 + (tl.arange(0, WAYS)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :])
    at = w.to(tl.pointer_type(tl.int32)) + (rows.to(tl.int64) * (in_dim // 4) + word)
    return tl.load(at, mask=word < end // 4, cache_modifier=".cg")


@triton.jit
def words_ahead(w, rows, begin, end, in_dim, WAYS: tl.constexpr, AHEAD: tl.constexpr):
    """A part's first AHEAD tiles of W."""
    words = ()
    for i in tl.static_range(AHEAD):
        words += (_words(w, rows, begin + i * (WAYS * 64), end, in_dim, WAYS),)  # type: ignore[assignment]
    return words


@triton.jit
def multiply_words(words, x, gain, w, rows, token, begin, end, count, in_dim, x_stride, BN: tl.constexpr,
                   TOKENS: tl.constexpr, WAYS: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr,
                   EVEN: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """A part's sums [BN, TOKENS] of codes times x [TOKENS from `token` on], after its first tiles of `words` came.
    WAYS: warps. EVEN: AHEAD tiles at a time end where the part ends."""
    WIDTH: tl.constexpr = WAYS * 64
    sums = tl.zeros((WAYS, BN, TOKENS), tl.float32)
    for start in tl.range(begin, end, WIDTH * AHEAD, num_stages=1):
        for i in tl.static_range(AHEAD):
            at = start + i * WIDTH
            left = _left_operand(words[0], WAYS, BN, FP8, NATIVE)
            words = words[1:]
            words += (_words(w, rows, at + WIDTH * AHEAD, end, in_dim, WAYS),)
            right = _right_operand(x, gain, token, at, end, count, x_stride, WAYS, TOKENS, NORM, EVEN, NATIVE)
            sums = tl.dot(left, right, sums)
    total = tl.sum(sums, 0)
    return total * _FP8_SCALE if FP8 else total


@triton.jit
def norm_factor(x, eps, in_dim):
    """rsqrt(mean(x²) + eps) of one row x."""
    squares = tl.zeros((2048,), tl.float32)
    for start in tl.range(0, in_dim, 2048, num_stages=1):
        column = start + tl.arange(0, 2048)
        value = tl.load(x + column, mask=column < in_dim, other=0.0).to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(squares) / in_dim + tl.load(eps))
