"""Floats as integers of the same order, for exact maxima and selections inside Triton kernels.

A best token travels between programs as one int64: the value's image above, the complement of its token id below, so
that the larger word is the larger value or, of equal ones, the lower id. Integer maxima come out the same in any order.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

NO_WORD = tl.constexpr(-(2**63))  # below every word of a token
_ID_MASK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def to_ordered(x):
    """float32 → int32 with the same order, both zeros alike."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(image):
    """The inverse of `to_ordered`."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_word(x, token):
    """The word of the largest of float32 x [N] with ids token [N] int32; a NaN is never the largest."""
    largest = tl.max(x, axis=0)
    first = tl.min(tl.where(x == largest, token, _ID_MASK), axis=0)
    return (to_ordered(largest).to(tl.int64) << 32) | (first ^ _ID_MASK).to(tl.int64)


@triton.jit
def word_token(word, vocab):
    """The token id of a word, int64; an id even where a row held nothing but NaN."""
    return tl.minimum((word & _ID_MASK) ^ _ID_MASK, vocab - 1)
