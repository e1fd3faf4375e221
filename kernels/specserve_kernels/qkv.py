"""What stands between the product of query, key and value and attention, in one pass over it.

Token t's row of qkv [T, (heads + 2 kv_heads) * head_dim] holds its query heads, key heads and value heads. In order:

    finite: NaN and ±inf become 0 (an adapter may overflow; in the cache that would outlive its request);
    norm:   query and key heads are RMS-normed, each by its row of weight [heads + kv_heads, head_dim] (Qwen3);
    query and key heads are rotated by cos and signed sin [T, 1, head_dim] (see rotary.py);
    keys and values go to slot slot_mapping[t] of the caches [slots, kv_heads, head_dim] (see kv_cache.py).

All of one dtype but eps (see norm.py) and slot_mapping (int64). The kernel computes in fp32 and rounds once; the
reference rounds after the norm too.
"""

from __future__ import annotations

from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.kv_cache import write_kv_ref
from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.norm import rms_norm_ref
from specserve_kernels.overlap import overlaps, wait
from specserve_kernels.rotary import rotary_ref

HeadWeights = tuple[Tensor, Tensor]
"""(weight [heads + kv_heads, head_dim], eps [])."""


def rotate_and_cache_ref(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, heads: int, norm: HeadWeights | None, finite: bool,
) -> Tensor:  # fmt: skip
    kv_heads, head_dim = k_cache.shape[1:]
    merged = qkv.view(-1, heads + 2 * kv_heads, head_dim)
    if finite:
        merged.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    qk, v = merged.split_with_sizes((heads + kv_heads, kv_heads), 1)
    if norm is not None:
        qk = rms_norm_ref(qk, *norm)
    q, k = rotary_ref(qk, cos, sin).split_with_sizes((heads, kv_heads), 1)
    write_kv_ref(k, v, k_cache, v_cache, slot_mapping)
    return q


@triton.jit
def load_head_weights(weight_ptr, eps_ptr, at, mask, HALF: tl.constexpr):
    """Norm weights of the halves of the heads at `at`, and eps; zeros where heads are not normed (weight_ptr None)."""
    low, high, eps = 0.0, 0.0, 0.0
    if weight_ptr is not None:
        eps = tl.load(eps_ptr)
        low = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(weight_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return low, high, eps


@triton.jit
def load_angles(cos_ptr, sin_ptr, token, column, mask, DIM: tl.constexpr):
    """cos a and sin a of the tokens: the first half of cos, the second of the signed sin."""
    cos = tl.load(cos_ptr + token * DIM + column, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * DIM + DIM // 2 + column, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def only_finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def rotated(low, high, is_rotated, weight_low, weight_high, eps, cos, sin,
            DIM: tl.constexpr, NORM: tl.constexpr, FINITE: tl.constexpr):  # fmt: skip
    """The halves of heads, float32, after all steps above but the last: values are only made finite."""
    if FINITE:
        low, high = only_finite(low), only_finite(high)
    x, y = low, high
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x + y * y, axis=1, keep_dims=True) / DIM + eps)
        x, y = x * inverse * weight_low, y * inverse * weight_high
    return tl.where(is_rotated, x * cos - y * sin, low), tl.where(is_rotated, y * cos + x * sin, high)


@triton.jit
def store_heads(q_ptr, k_ptr, v_ptr, k_stride, v_stride, low, high, token, head, column, slot, inside,
                HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Each head's halves to where its kind goes: queries by token, keys and values by slot."""
    ROTATED: tl.constexpr = HEADS + KV_HEADS
    at, half = head * DIM + column, DIM // 2
    low, high = low.to(q_ptr.dtype.element_ty), high.to(q_ptr.dtype.element_ty)
    q_at = q_ptr + token * (HEADS * DIM) + at
    k_at = k_ptr + slot * k_stride + at - HEADS * DIM
    v_at = v_ptr + slot * v_stride + at - ROTATED * DIM
    is_query, is_key, is_value = head < HEADS, (head >= HEADS) & (head < ROTATED), head >= ROTATED
    tl.store(q_at, low, mask=inside & is_query)
    tl.store(q_at + half, high, mask=inside & is_query)
    tl.store(k_at, low, mask=inside & is_key)
    tl.store(k_at + half, high, mask=inside & is_key)
    tl.store(v_at, low, mask=inside & is_value)
    tl.store(v_at + half, high, mask=inside & is_value)


@relaunched
@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def _rotate_and_cache_kernel(
    qkv_ptr, cos_ptr, sin_ptr, weight_ptr, eps_ptr, slot_ptr, q_ptr, k_ptr, v_ptr, k_stride, v_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, FINITE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILE heads of one token a program, of whichever kind; low and high are the halves of each head, padded to BLOCK.

    weight_ptr and eps_ptr None: no head norm.
    """
    ROTATED: tl.constexpr = HEADS + KV_HEADS
    TOTAL: tl.constexpr = ROTATED + KV_HEADS
    TILES: tl.constexpr = (TOTAL + TILE - 1) // TILE
    HALF: tl.constexpr = DIM // 2
    token = (tl.program_id(0) // TILES).to(tl.int64)
    head = tl.program_id(0) % TILES * TILE + tl.arange(0, TILE)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = head * DIM + column
    inside = (head < TOTAL) & (column < HALF)
    is_rotated = head < ROTATED
    weight_low, weight_high, eps = load_head_weights(weight_ptr, eps_ptr, at, inside & is_rotated, HALF)
    wait(PDL)
    slot = tl.load(slot_ptr + token)
    low = tl.load(qkv_ptr + token * (TOTAL * DIM) + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptr + token * (TOTAL * DIM) + at + HALF, mask=inside, other=0.0).to(tl.float32)
    # Loaded once a head, so that each thread gets its numbers where it needs them: one load for all heads would be
    # passed on through shared memory.
    angle = tl.broadcast_to(column, TILE, BLOCK)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, angle, angle < HALF, DIM)
    low, high = rotated(
        low, high, is_rotated, weight_low, weight_high, eps, cos, sin, DIM, weight_ptr is not None, FINITE
    )
    store_heads(q_ptr, k_ptr, v_ptr, k_stride, v_stride, low, high, token, head, column, slot, inside,
                HEADS, KV_HEADS, DIM)  # fmt: skip


def _tile(tokens: int, heads: int, half: int) -> tuple[int, int, int]:
    """(heads a program, padded half head, warps): each thread holds eight numbers of both halves of a head."""
    block = power_of_2(half)
    warps = 1 if tokens <= 64 else 4
    return min(max(256 * warps // block, 1), power_of_2(heads)), block, warps


def rotate_and_cache_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, heads: int, norm: HeadWeights | None, finite: bool,
) -> Tensor:  # fmt: skip
    tokens, (_, kv_heads, head_dim) = qkv.shape[0], k_cache.shape
    total = heads + 2 * kv_heads
    q = qkv.new_empty(tokens, heads, head_dim)
    (tile, block, warps), pdl = _tile(tokens, total, head_dim // 2), overlaps(qkv)
    weight, eps = norm or (None, None)
    _rotate_and_cache_kernel[(tokens * cdiv(total, tile),)](
        qkv, cos, sin, weight, eps, slot_mapping, q, k_cache, v_cache, k_cache.stride(0), v_cache.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, DIM=head_dim, FINITE=finite,
        TILE=tile, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return q


_IMPLEMENTATIONS = {"torch": rotate_and_cache_ref, "triton": rotate_and_cache_triton}


def rotate_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    *, heads: int, norm: HeadWeights | None, finite: bool,
) -> Tensor:  # fmt: skip
    """Queries [T, heads, head_dim], normed and rotated; keys and values are written to their slots of the caches.

    qkv is used up: its content is undefined afterwards. The queries' two inner dimensions are contiguous.
    """
    tokens, (_, kv_heads, head_dim) = qkv.shape[0], k_cache.shape
    assert qkv.is_contiguous() and qkv.shape[1] == (heads + 2 * kv_heads) * head_dim, (qkv.shape, heads, k_cache.shape)
    assert cos.shape == sin.shape == (tokens, 1, head_dim) and slot_mapping.shape == (tokens,), (cos.shape, qkv.shape)
    assert k_cache.shape == v_cache.shape and k_cache.stride()[1:] == v_cache.stride()[1:] == (head_dim, 1)
    assert qkv.dtype == cos.dtype == sin.dtype == k_cache.dtype == v_cache.dtype, (qkv.dtype, cos.dtype, k_cache.dtype)
    implementation = _IMPLEMENTATIONS[backend(qkv, _IMPLEMENTATIONS)]
    return implementation(qkv, cos, sin, k_cache, v_cache, slot_mapping, heads=heads, norm=norm, finite=finite)
