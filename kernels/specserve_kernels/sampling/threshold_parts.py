"""The parts that the kernels of threshold.py share: masses as integers, and the bracket that the pivots leave."""

from __future__ import annotations

from specserve_kernels.language import tl, triton

NUM_PIVOTS = 16
ONE = 2**42  # the mass of probability 1
_NUM_PIVOTS = tl.constexpr(NUM_PIVOTS)
_TOKEN = tl.constexpr(2**44)
_MASS_MASK = tl.constexpr(2**44 - 1)
_ONE = tl.constexpr(float(ONE))


@triton.jit
def weight_of(x, largest, scale):
    """One token and its mass as one int64: 1 · 2^44 + exp(x − m) · scale, where scale = 2^42 / s."""
    return (tl.exp(x - largest) * scale).to(tl.int64) + _TOKEN


@triton.jit
def mass_of(weight):
    """The mass in a sum of weights, exact in float64."""
    return (weight & _MASS_MASK).to(tl.float64)


@triton.jit
def count_of(weight):
    return weight >> 44


@triton.jit
def needed_mass(top_p):
    """Of all tokens; a top_p that is off needs more than there is."""
    return tl.minimum(top_p, 2.0).to(tl.float64) * _ONE


@triton.jit
def pivot(low, high, index):
    """Pivot `index` of 16 between low (0) and high (16): one fused rounding, so that all kernels have the same bits."""
    return tl.fma((high - low) * (1.0 / _NUM_PIVOTS), index.to(tl.float32), low)


@triton.jit
def bracket(bounds, pivot_sums, needed, row, num_rows, ROUNDS: tl.constexpr):
    """(low, high, above): the threshold is in [low, high), and `above` is the weight of all tokens from high on.

    Where above is 0, high is the row's maximum and belongs to the bracket. bounds [rows, 4] float32: m, scale, low,
    high; pivot_sums [ROUNDS, rows, 16] int64: the weight of all tokens from each pivot on.
    """
    low = tl.load(bounds + row * 4 + 2)
    high = tl.load(bounds + row * 4 + 3)
    above = tl.full((), 0, tl.int64)
    index = tl.arange(0, _NUM_PIVOTS)
    for i in tl.static_range(ROUNDS):
        sums = tl.load(pivot_sums + (i * num_rows + row) * _NUM_PIVOTS + index)
        chosen = tl.max(tl.where(mass_of(sums) >= needed, index, 0), axis=0)  # the highest pivot that reaches the mass
        is_last = chosen == _NUM_PIVOTS - 1
        above = tl.where(is_last, above, tl.sum(tl.where(index == chosen + 1, sums, 0), axis=0))
        next_high = tl.where(is_last, high, pivot(low, high, chosen + 1))
        low = pivot(low, high, chosen)
        high = next_high
    return low, high, above
