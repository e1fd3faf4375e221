"""The softmax of a long row from its tiles, for kernels whose programs hold one tile each.

With m_t = max of tile t and s_t = Σ exp(x − m_t) over it, the row's are m = max m_t and s = Σ s_t exp(m_t − m), and
p(x) = exp(x − m) / s. The tile's size is fixed and the order of the sum with it, so that a row's probabilities do not
depend on the other rows; equal logits have bitwise equal probabilities in every kernel that computes them like this.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

STATISTICS_TILE = 2048  # 63 tiles of 128256 tokens; 16 elements a thread of 4 warps


@triton.jit
def tile_statistics(x):
    """float32 x [N], −inf past the row's end → (m_t, s_t); a tile without a possible token has (−inf, 0)."""
    largest = tl.max(x, axis=0)
    return largest, tl.sum(tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest)), axis=0)


@triton.jit
def row_statistics(maxima, sums, axis: tl.constexpr):
    """(m, s) from tiles' values along `axis`; what stands for no tile has (−inf, 0). s is 1 where m is −inf."""
    largest = tl.max(maxima, axis=axis)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(sums * tl.exp(maxima - tl.expand_dims(shift, axis)), axis=axis)
    return shift, tl.where(largest == float("-inf"), 1.0, total)


@triton.jit
def probability(x, largest, total):
    return tl.exp(x - largest) / total
