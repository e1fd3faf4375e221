"""The second half of a grouped LoRA: the shrunk activations times B, added where a linear's output is read.

    Δ[token, c] = Σ_m Σ_r (Σ_k s[k, token, m, p, r]) · b[slot * R + r, c]

over the slots of the token, p being the part that column c belongs to; s as `shrink` leaves it. b [S * R, out_features]
in the model's dtype: row slot * R + r is rank r of a slot over the columns of all parts. Splits are added in order, all
products in float32, y included, and rounded once. A tile's rank blocks are taken together, with zeros for the tokens
that do not use them, which leave sums as they are: a token's result does not depend on the others.

    add      y += Δ
    silu     silu(gate + Δ) * (up + Δ)      gate and up: the halves of y, of one part each
    rotate   see qkv.rotate_and_cache, of y + Δ, whose heads belong to one part each
"""

from __future__ import annotations

from specserve_kernels.activation import gated
from specserve_kernels.language import tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.overlap import wait
from specserve_kernels.qkv import load_angles, load_head_weights, rotated, store_heads

MAX_PARTS = 4


@triton.jit
def _places(token_slots, blocks, count, done, token, part, rank_stride,
            M: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
    """Where the tokens [TILE, 1] have RANKS ranks from block `done` on in s: the row's begin [TILE, RANKS], negative
    for tokens that do not have them, and the ranks [1, RANKS], in runs of 16 for the loads' sake."""
    lane = tl.arange(0, RANKS)[None, :]
    code = tl.load(blocks + done + lane // 16, mask=done + lane // 16 < count, other=-512)
    slot = tl.where(code < 0, -2, code >> 16)
    index = token * 0 - 1
    for m in tl.static_range(M):
        hit = tl.load(token_slots + token * M + m) == slot
        index = tl.where(hit, (token * M + m) * PARTS + part, index)
    return index * rank_stride, ((code >> 8) & 255) * 16 + lane % 16


@triton.jit
def _shrunk(s, rows, ranks, split_stride, SPLITS: tl.constexpr, FACTOR: tl.constexpr):
    """s there, the sum of all splits."""
    total = tl.load(s + (rows + ranks), mask=rows >= 0, other=0.0)
    for k in tl.static_range(1, SPLITS):
        total += tl.load(s + k * split_stride + (rows + ranks), mask=rows >= 0, other=0.0)
    return total.to(FACTOR)


@triton.jit
def _factors(b, blocks, count, done, column, inside, rank_stride, b_stride, RANKS: tl.constexpr, FACTOR: tl.constexpr):
    """Bᵀ of the same ranks, [RANKS, COLUMNS], zeros beyond those in use."""
    lane = tl.arange(0, RANKS)
    code = tl.load(blocks + done + lane // 16, mask=done + lane // 16 < count, other=0)
    row = (code >> 16).to(tl.int64) * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
    live = lane % 16 < (code & 255)
    return tl.load(b + row[:, None] * b_stride + column, mask=live[:, None] & inside, other=0.0).to(FACTOR)


@triton.jit
def _delta(shrunk, factors, b, column, inside, s, token_slots, blocks, count, token, part,
           rank_stride, split_stride, b_stride, M: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
           RANKS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Δ [TILE, COLUMNS] of all blocks; `shrunk` and `factors` are those of the first."""
    total = tl.dot(shrunk, factors, input_precision=PRECISION)
    done = RANKS // 16
    while done < count:
        rows, ranks = _places(token_slots, blocks, count, done, token, part, rank_stride, M, PARTS, RANKS)
        more = _shrunk(s, rows, ranks, split_stride, SPLITS, FACTOR)
        factors = _factors(b, blocks, count, done, column, inside, rank_stride, b_stride, RANKS, FACTOR)
        total = tl.dot(more, factors, total, input_precision=PRECISION)
        done += RANKS // 16
    return total


@triton.jit
def _part_of_block(block, w0, w1, w2, w3, COLUMNS: tl.constexpr):
    """(part, its first column, its width, first column within it) of the block of COLUMNS columns."""
    part, column, width = 0, 0, w0
    for p in tl.static_range(1, 4):
        blocks = tl.cdiv(width, COLUMNS)
        if (part == p - 1) & (block >= blocks):
            block -= blocks
            part, column = p, column + width
            width = w1 if p == 1 else w2 if p == 2 else w3
    return part, column, width, block * COLUMNS


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"])
def add_kernel(
    y, b, s, token_slots, counts, blocks,
    w0, w1, w2, w3, num_tokens, most, rank_stride, split_stride, b_stride, y_stride,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, LOOPS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y += Δ: a tile and LOOPS times COLUMNS columns of one part a program."""
    tile = tl.program_id(1)
    count, blocks = tl.load(counts + tile), blocks + tile * most
    part, start, width, first = _part_of_block(tl.program_id(0), w0, w1, w2, w3, COLUMNS * LOOPS)
    c = first + tl.arange(0, COLUMNS)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    factors = _factors(b, blocks, count, 0, start + c, c < width, rank_stride, b_stride, RANKS, FACTOR)
    rows, ranks = _places(token_slots, blocks, count, 0, token, part, rank_stride, M, PARTS, RANKS)
    wait(PDL)
    if count == 0:
        return
    shrunk = _shrunk(s, rows, ranks, split_stride, SPLITS, FACTOR)
    for loop in range(LOOPS):
        c = first + loop * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        at, inside = y + (token * y_stride + start + c), (token < num_tokens) & (c < width)
        base = tl.load(at, mask=inside, other=0.0)
        if LOOPS > 1:
            factors = _factors(b, blocks, count, 0, start + c, c < width, rank_stride, b_stride, RANKS, FACTOR)
        delta = _delta(shrunk, factors, b, start + c, c < width, s, token_slots, blocks, count, token, part,
                       rank_stride, split_stride, b_stride, M, PARTS, SPLITS, RANKS, FACTOR, PRECISION)  # fmt: skip
        tl.store(at, (base.to(tl.float32) + delta).to(y.dtype.element_ty), mask=inside)


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"])
def silu_kernel(
    y, b, s, out, token_slots, counts, blocks,
    size, num_tokens, most, rank_stride, split_stride, b_stride,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr,
    COLUMNS: tl.constexpr, LOOPS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, size] of y [T, 2 * size]: a tile and LOOPS times COLUMNS results a program."""
    tile = tl.program_id(1)
    count, blocks = tl.load(counts + tile), blocks + tile * most
    first = tl.program_id(0) * (COLUMNS * LOOPS)
    c = first + tl.arange(0, COLUMNS)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    gates = _factors(b, blocks, count, 0, c, c < size, rank_stride, b_stride, RANKS, FACTOR)
    ups = _factors(b, blocks, count, 0, size + c, c < size, rank_stride, b_stride, RANKS, FACTOR)
    gate_rows, ranks = _places(token_slots, blocks, count, 0, token, 0, rank_stride, M, PARTS, RANKS)
    up_rows, _ = _places(token_slots, blocks, count, 0, token, PARTS - 1, rank_stride, M, PARTS, RANKS)
    wait(PDL)
    to_gate = _shrunk(s, gate_rows, ranks, split_stride, SPLITS, FACTOR)
    to_up = _shrunk(s, up_rows, ranks, split_stride, SPLITS, FACTOR)
    for loop in range(LOOPS):
        c = first + loop * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        at, inside = y + token.to(tl.int64) * (2 * size) + c, (token < num_tokens) & (c < size)
        gate = tl.load(at, mask=inside, other=0.0)
        up = tl.load(at + size, mask=inside, other=0.0)
        if LOOPS > 1:
            gates = _factors(b, blocks, count, 0, c, c < size, rank_stride, b_stride, RANKS, FACTOR)
            ups = _factors(b, blocks, count, 0, size + c, c < size, rank_stride, b_stride, RANKS, FACTOR)
        more = _delta(to_gate, gates, b, c, c < size, s, token_slots, blocks, count, token, 0,
                      rank_stride, split_stride, b_stride, M, PARTS, SPLITS, RANKS, FACTOR, PRECISION)  # fmt: skip
        gate = gate.to(tl.float32) + more
        more = _delta(to_up, ups, b, size + c, c < size, s, token_slots, blocks, count, token, PARTS - 1,
                      rank_stride, split_stride, b_stride, M, PARTS, SPLITS, RANKS, FACTOR, PRECISION)  # fmt: skip
        result = gated(gate, up.to(tl.float32) + more)
        tl.store(out + token.to(tl.int64) * size + c, result.to(out.dtype.element_ty), mask=inside)


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"], do_not_specialize_on_alignment=["slot_ptr"])
def rotate_kernel(
    y, b, s, token_slots, counts, blocks, cos_ptr, sin_ptr, weight_ptr, eps_ptr, slot_ptr, q_ptr, k_ptr, v_ptr,
    w0, w1, w2, num_tokens, most, rank_stride, split_stride, b_stride, k_stride, v_stride,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr,
    FINITE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile and LOOPS heads of one part a program; BLOCK: half of a head, padded."""
    HALF: tl.constexpr = DIM // 2
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    tile, first = tl.program_id(1), tl.program_id(0) * LOOPS
    count, blocks = tl.load(counts + tile), blocks + tile * most
    part = (first * DIM >= w0).to(tl.int32) + (first * DIM >= w0 + w1) + (first * DIM >= w0 + w1 + w2)
    column = tl.arange(0, BLOCK)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    inside, half = (token < num_tokens) & (column < HALF), column < HALF
    at = first * DIM + column
    lows = _factors(b, blocks, count, 0, at, half, rank_stride, b_stride, RANKS, FACTOR)
    highs = _factors(b, blocks, count, 0, at + HALF, half, rank_stride, b_stride, RANKS, FACTOR)
    rows, ranks = _places(token_slots, blocks, count, 0, token, part, rank_stride, M, PARTS, RANKS)
    wait(PDL)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=0)
    cos, sin = load_angles(cos_ptr, sin_ptr, token.to(tl.int64), column, inside & (first < HEADS + KV_HEADS), DIM)
    shrunk = _shrunk(s, rows, ranks, split_stride, SPLITS, FACTOR)
    for loop in range(LOOPS):
        head = first + loop
        at = head * DIM + column
        low = tl.load(y + token.to(tl.int64) * ROW + at, mask=inside, other=0.0)
        high = tl.load(y + token.to(tl.int64) * ROW + at + HALF, mask=inside, other=0.0)
        if LOOPS > 1:
            lows = _factors(b, blocks, count, 0, at, half, rank_stride, b_stride, RANKS, FACTOR)
            highs = _factors(b, blocks, count, 0, at + HALF, half, rank_stride, b_stride, RANKS, FACTOR)
        more = _delta(shrunk, lows, b, at, half, s, token_slots, blocks, count, token, part,
                      rank_stride, split_stride, b_stride, M, PARTS, SPLITS, RANKS, FACTOR, PRECISION)  # fmt: skip
        low = low.to(tl.float32) + more
        more = _delta(shrunk, highs, b, at + HALF, half, s, token_slots, blocks, count, token, part,
                      rank_stride, split_stride, b_stride, M, PARTS, SPLITS, RANKS, FACTOR, PRECISION)  # fmt: skip
        high = high.to(tl.float32) + more
        is_rotated = head < HEADS + KV_HEADS
        weight_low, weight_high, eps = load_head_weights(weight_ptr, eps_ptr, at, half & is_rotated, HALF)
        low, high = rotated(
            low, high, is_rotated, weight_low, weight_high, eps, cos, sin, DIM, weight_ptr is not None, FINITE
        )
        store_heads(q_ptr, k_ptr, v_ptr, k_stride, v_stride, low, high, token.to(tl.int64), head, column, slot, inside,
                    HEADS, KV_HEADS, DIM)  # fmt: skip
