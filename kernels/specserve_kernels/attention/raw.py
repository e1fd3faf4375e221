"""What decode attention does with qkv as the product leaves it: the steps of `qkv`, without a kernel of their own.

A program rotates its queries in registers. The one whose part of the keys holds a new token's position rotates that
token's key and writes it and the value to the cache, before it reads them there as it reads all others: each new token
is in one part of its sequence. Programs of other row blocks of the part write the same numbers. Other sequences read a
new token's place in two cases: in the bin (block 0), where anything finite will do; and where one computes a token
again in a block that it shares (a whole hit in the prefix cache, a draft's first pass). They may then find the token's
key and value as they were or as they become, which are equal up to rounding.

Everything but qkv itself was there before the kernel in front began (see overlap), so that it is read before the wait;
what is fetched then goes to the second-level cache, which sees the writes. Rounding is that of `qkv`: computed in fp32
and rounded once. A head's norm may be summed in another order.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.qkv import load_angles, load_head_weights, only_finite, rotated


@triton.jit
def load_turn(cos_ptr, sin_ptr, weight_ptr, eps_ptr, token, head, inside, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """What turns the queries of the rows, of `token` and `head` each: cos and signed sin [BLOCK_M, DIM]; the norm
    weights of the queries and of their other halves, and eps, or numbers where heads are not normed."""
    dims = tl.arange(0, DIM)[None, :]
    angle = token[:, None] * HEAD_DIM + dims
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    weight, other_weight, eps = 1.0, 1.0, 0.0
    if weight_ptr is not None:
        row, eps = weight_ptr + head[:, None] * HEAD_DIM, tl.load(eps_ptr)
        weight = tl.load(row + dims, mask=inside, other=0.0)
        other_weight = tl.load(row + (dims + HEAD_DIM // 2) % HEAD_DIM, mask=inside, other=0.0)
    return cos, sin, weight, other_weight, eps


@triton.jit
def load_other_halves(first, dims, inside, HEAD_DIM: tl.constexpr):
    """Of the heads that begin at pointers `first`: for each number the one half a head away."""
    return tl.load(first[:, None] + (dims[None, :] + HEAD_DIM // 2) % HEAD_DIM, mask=inside, other=0.0)


@triton.jit
def turned(q, other, turn, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, FINITE: tl.constexpr):
    """Queries q [BLOCK_M, DIM], normed and rotated, with their other halves; `turn` as load_turn gives it."""
    cos, sin, weight, other_weight, eps = turn
    x, y = q.to(tl.float32), other.to(tl.float32)
    if FINITE:
        x, y = only_finite(x), only_finite(y)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
        x, y = x * inverse * weight.to(tl.float32), y * inverse * other_weight.to(tl.float32)
    return (x * cos.to(tl.float32) + y * sin.to(tl.float32)).to(q.dtype)


@triton.jit
def load_places(positions, slots, cos_ptr, sin_ptr, weight_ptr, eps_ptr, first_token, num_queries, begin, end, head,
                HEAD_DIM: tl.constexpr, NEW: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Where the sequence's tokens whose positions are among begin … end - 1 go, and what turns key head `head`:
    (tokens, slots, those halves of heads that are written, each [NEW, HALF] or [NEW, 1]; cos, sin; norm weights, eps).
    """
    new, column = tl.arange(0, NEW)[:, None], tl.arange(0, HALF)[None, :]
    token = first_token + new
    place = tl.load(positions + token, mask=new < num_queries, other=-1)
    here = (place >= begin) & (place < end)
    written = here & (column < HEAD_DIM // 2)
    slot = tl.load(slots + token, mask=here, other=0)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, column, written, HEAD_DIM)
    low, high, eps = load_head_weights(weight_ptr, eps_ptr, head * HEAD_DIM + column, written, HEAD_DIM // 2)
    return token, slot, written, cos, sin, low, high, eps


@triton.jit
def write_new(qkv, k_cache, v_cache, places, row_stride, slot_stride, key_head, value_head, HEAD_DIM: tl.constexpr,
              HALF: tl.constexpr, NORM: tl.constexpr, FINITE: tl.constexpr):  # fmt: skip
    """Keys, normed and rotated, and values of `places` (see load_places) go to the caches, which begin at their head.
    All threads have written when one returns."""
    token, slot, written, cos, sin, weight_low, weight_high, eps = places
    column, half = tl.arange(0, HALF)[None, :], HEAD_DIM // 2
    row = qkv + token * row_stride + column
    key, value = row + key_head * HEAD_DIM, row + value_head * HEAD_DIM
    low = tl.load(key, mask=written, other=0.0).to(tl.float32)
    high = tl.load(key + half, mask=written, other=0.0).to(tl.float32)
    v_low = tl.load(value, mask=written, other=0.0).to(tl.float32)
    v_high = tl.load(value + half, mask=written, other=0.0).to(tl.float32)
    low, high = rotated(low, high, True, weight_low, weight_high, eps, cos, sin, HEAD_DIM, NORM, FINITE)
    if FINITE:
        v_low, v_high = only_finite(v_low), only_finite(v_high)
    at = slot * slot_stride + column
    tl.store(k_cache + at, low.to(k_cache.dtype.element_ty), mask=written)
    tl.store(k_cache + at + half, high.to(k_cache.dtype.element_ty), mask=written)
    tl.store(v_cache + at, v_low.to(v_cache.dtype.element_ty), mask=written)
    tl.store(v_cache + at + half, v_high.to(v_cache.dtype.element_ty), mask=written)
    tl.debug_barrier()
