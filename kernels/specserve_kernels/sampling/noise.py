"""The numbers of `random.py` inside Triton kernels: the same 64-bit words, the same noise up to its last bits.

    key = noise_key(seed, position, stream)        one a row, int64 scalars or tensors
    gumbel(key, token), uniform(key)               float32 a token, float64 in [0, 1)

Words are uint64 here, where multiplication wraps and a shift is logical. log1p, which the interpreter lacks, is written
with log alone (Kahan): u = 1 + x rounded, log1p(x) = log(u) · x / (u − 1). The error of u cancels, so the result has
x's full relative precision at any magnitude; where u is 1, it is x.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MUL1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MUL2 = tl.constexpr(0x94D049BB133111EB)
_NUM_STREAMS = tl.constexpr(4)
_UNIT = tl.constexpr(2.0**-53)
_LARGEST = tl.constexpr(2.0**53 * (1.0 - 2.0**-24))  # the largest float32 below 2^53


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * _MUL1
    z = (z ^ (z >> 27)) * _MUL2
    return z ^ (z >> 31)


@triton.jit
def noise_key(seed, position, stream):
    """`random.keys`: int64 seed, position, stream → uint64."""
    counter = position * _NUM_STREAMS + (stream + 1)
    return _mix(counter.to(tl.uint64) * _GAMMA + seed.to(tl.uint64))


@triton.jit
def _bits53(key, token):
    """The upper 53 of a token's 64 bits, as int64."""
    return (_mix(key + (token + 1).to(tl.uint64) * _GAMMA) >> 11).to(tl.int64)


@triton.jit
def log1p(x):
    """log(1 + x) of float32 x > −1, to a few units in the last place."""
    u = 1.0 + x
    d = u - 1.0
    is_small = d == 0.0
    return tl.where(is_small, x, tl.log(u) * (x / tl.where(is_small, 1.0, d)))


@triton.jit
def bits_to_gumbel(bits):
    """`random.bits_to_gumbel` of the upper 53 bits (int64), float32."""
    v = tl.minimum(tl.maximum(bits.to(tl.float32), 0.5), _LARGEST)
    return -tl.log(-log1p(v * -_UNIT))


@triton.jit
def gumbel(key, token):
    """Standard Gumbel noise of tokens (any integer dtype), float32."""
    return bits_to_gumbel(_bits53(key, token))


@triton.jit
def uniform(key):
    """`random.uniform`: float64 in [0, 1), of token 0's bits."""
    return _bits53(key, tl.zeros_like(key).to(tl.int64)).to(tl.float64) * _UNIT
