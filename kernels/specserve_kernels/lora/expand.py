"""The second half of a grouped LoRA: the shrunk activations times B, added where a linear's output is read.

    Δ[token, c] = Σ_slot Σ_r s[token, slot, p, r] · b[slot * R + r, c]

over the slots of the token, p being the part that column c belongs to; s, in the dtype of the product, lies in one of
three ways: "dense" or "compact", as `shrink` or `gather` leaves it, or "behind" the linear's output in each token's
row, left by a product whose weights have A behind them: x · Aᵀ of all slots [T, S * P * R], which is weighted here.
b [S * R, out_features] in the model's dtype: row slot * R + r is rank r of a slot over the columns of all parts. All
products in float32, y included, and rounded once. A tile's rank blocks are taken together, with zeros for the tokens
that do not use them, which leave sums as they are: a token's result does not depend on the others.

    add      y += Δ                         or y += product + Δ
    silu     silu(gate + Δ) * (up + Δ)      gate and up: the halves of y, of one part each
    rotate   see qkv.rotate_and_cache, of y + Δ, whose heads belong to one part each

What a program needs of B and of the tiles was there before the kernel in front of it began: it reads that before it
waits for s and y (see overlap). Where s lies behind y it asks for y first, which need not wait for the tile's count.
"""

from __future__ import annotations

from specserve_kernels.activation import gated
from specserve_kernels.language import tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.lora.tiles import load_code
from specserve_kernels.overlap import wait
from specserve_kernels.qkv import load_angles, load_head_weights, rotated, store_heads

MAX_PARTS = 4


@triton.jit
def load_weights(weights, blocks, count, done, tile, most, TILE: tl.constexpr, RANKS: tl.constexpr, LIES: tl.constexpr):
    """What the tile's tokens weigh the ranks from block `done` on with, where that is not in s: [TILE, RANKS], or
    [TILE, 1] of a single block."""
    if LIES == "behind":
        token = tile * TILE + tl.arange(0, TILE)[:, None]
        block = done if RANKS == 16 else done + tl.arange(0, RANKS)[None, :] // 16
        weight = tl.load(weights + token * most + block, mask=block < most, other=0.0)
        return tl.where(block < count, weight, 0.0)
    else:
        return 1.0


@triton.jit
def load_s(s, token_slots, weight, blocks, count, done, tile, part, most, rank_stride, s_stride, M: tl.constexpr,
           TILE: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, LIES: tl.constexpr):  # fmt: skip
    """s [TILE, RANKS] of the tile's tokens from block `done` on, zeros where a token does not have a rank."""
    lane, row = tl.arange(0, RANKS)[None, :], tl.arange(0, TILE)[:, None]
    if LIES == "dense":
        at = s + ((tile * PARTS + part) * TILE + row) * s_stride + done * 16 + lane
        return tl.load(at, mask=(row >= 0) & (done < count), other=0.0)  # nothing was written of a tile without blocks
    elif LIES == "compact":
        block, token = done + lane // 16, tile * TILE + row
        code = load_code(blocks, block, count, most, -131072)  # of slot -2, which nobody has
        begin = token * 0 - 1
        for m in tl.static_range(M):
            hit = tl.load(token_slots + token * M + m) == (code >> 16)
            begin = tl.where(hit, (token * M + m) * PARTS + part, begin)
        at = begin * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
        return tl.load(s + at, mask=begin >= 0, other=0.0)
    else:
        block, token = done if RANKS == 16 else done + lane // 16, tile * TILE + row
        code = load_code(blocks, block, count, most, 0)
        first = ((code >> 16) * PARTS + part) * rank_stride + ((code >> 8) & 255) * 16
        own = (weight != 0.0) & (lane % 16 < (code & 255))  # others' ranks may be infinite, and so is what lies behind
        shrunk = tl.load(s + token.to(tl.int64) * s_stride + first + lane % 16, mask=own, other=0.0)
        return (shrunk.to(tl.float32) * weight).to(s.dtype.element_ty)


@triton.jit
def load_b(
    b, blocks, count, done, column, inside, most, rank_stride, b_stride, RANKS: tl.constexpr, FACTOR: tl.constexpr
):
    """Bᵀ of the same ranks, [RANKS, COLUMNS], zeros beyond those in use."""
    lane = tl.arange(0, RANKS)
    code = load_code(blocks, done + lane // 16, count, most, 0)
    row = (code >> 16).to(tl.int64) * rank_stride + ((code >> 8) & 255) * 16 + lane % 16
    live = lane % 16 < (code & 255)
    return tl.load(b + row[:, None] * b_stride + column, mask=live[:, None] & inside, other=0.0).to(FACTOR)


@triton.jit
def s_by_b(shrunk, factors, s, b, token_slots, weights, blocks, count, tile, part, column, inside, most,
           rank_stride, s_stride, b_stride, M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
           RANKS: tl.constexpr, WIDE: tl.constexpr, LIES: tl.constexpr, FACTOR: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Δ [TILE, COLUMNS] of all blocks; `shrunk` and `factors` are those of the first RANKS ranks. A tile with more has
    many, of decodes among a prompt's: these are taken WIDE at a time."""
    total = tl.dot(shrunk, factors, input_precision=PRECISION)
    for done in tl.range(RANKS // 16, count, WIDE // 16, num_stages=3 if LIES == "dense" else 1):
        weight = load_weights(weights, blocks, count, done, tile, most, TILE, WIDE, LIES)
        more = load_s(s, token_slots, weight, blocks, count, done, tile, part, most, rank_stride, s_stride, M, TILE,
                      PARTS, WIDE, LIES)  # fmt: skip
        more_factors = load_b(b, blocks, count, done, column, inside, most, rank_stride, b_stride, WIDE, FACTOR)
        total = tl.dot(more, more_factors, total, input_precision=PRECISION)
    return total


@triton.jit
def _part_of_block(block, w0, w1, w2, w3, columns):
    """(part, its first column, its width, first column within it) of the block of so many columns."""
    part, column, width = 0, 0, w0
    for p in tl.static_range(1, 4):
        blocks = tl.cdiv(width, columns)
        if (part == p - 1) & (block >= blocks):
            block -= blocks
            part, column = p, column + width
            width = w1 if p == 1 else w2 if p == 2 else w3
    return part, column, width, block * columns


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"], do_not_specialize_on_alignment=["loops"])
def add_kernel(
    y, product, b, s, token_slots, weights, counts, blocks,
    w0, w1, w2, w3, num_tokens, most, rank_stride, s_stride, b_stride, y_stride, product_stride, loops,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, LIES: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y += Δ, and `product` if it is given: a tile and loops times COLUMNS columns of one part a program."""
    tile = tl.program_id(1)
    count, blocks = tl.load(counts + tile), blocks + tile * most
    part, start, width, first = _part_of_block(tl.program_id(0), w0, w1, w2, w3, COLUMNS * loops)
    c = first + tl.arange(0, COLUMNS)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    at, inside = y + (token * y_stride + start + c), (token < num_tokens) & (c < width)
    if LIES == "behind":
        wait(PDL)
        base = tl.load(at, mask=inside, other=0.0)
    factors = load_b(b, blocks, count, 0, start + c, c < width, most, rank_stride, b_stride, RANKS, FACTOR)
    weight = load_weights(weights, blocks, count, 0, tile, most, TILE, RANKS, LIES)
    if LIES != "behind":
        wait(PDL)
        if (count == 0) & (product is None):
            return
        base = tl.load(at, mask=inside, other=0.0)
    if product is not None:
        more_at = product + (token * product_stride + start + c)
        base = base.to(tl.float32) + tl.load(more_at, mask=inside, other=0.0).to(tl.float32)
    shrunk = load_s(s, token_slots, weight, blocks, count, 0, tile, part, most, rank_stride, s_stride, M, TILE, PARTS,
                    RANKS, LIES)  # fmt: skip
    for loop in range(loops):
        # What the next columns need is on its way while these are computed.
        next_c = c + COLUMNS
        next_inside = (token < num_tokens) & (next_c < width) & (loop + 1 < loops)
        next_base = tl.load(at + COLUMNS, mask=next_inside, other=0.0)
        if product is not None:
            more_at += COLUMNS
            next_base = next_base.to(tl.float32) + tl.load(more_at, mask=next_inside, other=0.0).to(tl.float32)
        next_factors = load_b(b, blocks, count, 0, start + next_c, (next_c < width) & (loop + 1 < loops), most,
                              rank_stride, b_stride, RANKS, FACTOR)  # fmt: skip
        delta = s_by_b(shrunk, factors, s, b, token_slots, weights, blocks, count, tile, part, start + c,
                       c < width, most, rank_stride, s_stride, b_stride, M, TILE, PARTS, RANKS, WIDE, LIES, FACTOR,
                       PRECISION)  # fmt: skip
        tl.store(at, (base.to(tl.float32) + delta).to(y.dtype.element_ty), mask=inside)
        at, c, inside, base, factors = at + COLUMNS, next_c, next_inside, next_base, next_factors


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"], do_not_specialize_on_alignment=["loops"])
def silu_kernel(
    y, b, s, out, token_slots, weights, counts, blocks,
    size, num_tokens, most, rank_stride, s_stride, b_stride, y_stride, loops,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, LIES: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [T, size] of y [T, 2 * size]: a tile and loops times COLUMNS results a program."""
    tile = tl.program_id(1)
    count, blocks = tl.load(counts + tile), blocks + tile * most
    c = tl.program_id(0) * (COLUMNS * loops) + tl.arange(0, COLUMNS)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    row, inside = y + token.to(tl.int64) * y_stride, (token < num_tokens) & (c < size)
    if LIES == "behind":
        wait(PDL)
        gate, up = tl.load(row + c, mask=inside, other=0.0), tl.load(row + size + c, mask=inside, other=0.0)
    gates = load_b(b, blocks, count, 0, c, c < size, most, rank_stride, b_stride, RANKS, FACTOR)
    ups = load_b(b, blocks, count, 0, size + c, c < size, most, rank_stride, b_stride, RANKS, FACTOR)
    weight = load_weights(weights, blocks, count, 0, tile, most, TILE, RANKS, LIES)
    if LIES != "behind":
        wait(PDL)
        gate, up = tl.load(row + c, mask=inside, other=0.0), tl.load(row + size + c, mask=inside, other=0.0)
    to_gate = load_s(s, token_slots, weight, blocks, count, 0, tile, 0, most, rank_stride, s_stride, M, TILE, PARTS,
                     RANKS, LIES)  # fmt: skip
    to_up = load_s(s, token_slots, weight, blocks, count, 0, tile, PARTS - 1, most, rank_stride, s_stride, M, TILE,
                   PARTS, RANKS, LIES)  # fmt: skip
    for loop in range(loops):
        next_c = c + COLUMNS
        more = (next_c < size) & (loop + 1 < loops)
        next_inside = (token < num_tokens) & more
        next_gate = tl.load(row + next_c, mask=next_inside, other=0.0)
        next_up = tl.load(row + size + next_c, mask=next_inside, other=0.0)
        next_gates = load_b(b, blocks, count, 0, next_c, more, most, rank_stride, b_stride, RANKS, FACTOR)
        next_ups = load_b(b, blocks, count, 0, size + next_c, more, most, rank_stride, b_stride, RANKS, FACTOR)
        delta = s_by_b(to_gate, gates, s, b, token_slots, weights, blocks, count, tile, 0, c, c < size,
                       most, rank_stride, s_stride, b_stride, M, TILE, PARTS, RANKS, WIDE, LIES, FACTOR,
                       PRECISION)  # fmt: skip
        x = gate.to(tl.float32) + delta
        delta = s_by_b(to_up, ups, s, b, token_slots, weights, blocks, count, tile, PARTS - 1, size + c, c < size,
                       most, rank_stride, s_stride, b_stride, M, TILE, PARTS, RANKS, WIDE, LIES, FACTOR,
                       PRECISION)  # fmt: skip
        result = gated(x, up.to(tl.float32) + delta).to(out.dtype.element_ty)
        tl.store(out + token.to(tl.int64) * size + c, result, mask=inside)
        c, inside, gate, up, gates, ups = next_c, next_inside, next_gate, next_up, next_gates, next_ups


@relaunched
@triton.jit(do_not_specialize=["num_tokens", "most"], do_not_specialize_on_alignment=["slot_ptr"])
def rotate_kernel(
    y, b, s, token_slots, weights, counts, blocks, cos_ptr, sin_ptr, norm_ptr, eps_ptr, slot_ptr,
    q_ptr, k_ptr, v_ptr, w0, w1, w2, num_tokens, most, rank_stride, s_stride, b_stride, y_stride, k_stride, v_stride,
    M: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LOOPS: tl.constexpr,
    FINITE: tl.constexpr, WIDE: tl.constexpr, LIES: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile and LOOPS heads of one part a program; BLOCK: half of a head, padded."""
    HALF: tl.constexpr = DIM // 2
    tile, head = tl.program_id(1), tl.program_id(0) * LOOPS
    count, blocks = tl.load(counts + tile), blocks + tile * most
    part = (head * DIM >= w0).to(tl.int32) + (head * DIM >= w0 + w1) + (head * DIM >= w0 + w1 + w2)
    column = tl.arange(0, BLOCK)[None, :]
    token = tile * TILE + tl.arange(0, TILE)[:, None]
    inside, half = (token < num_tokens) & (column < HALF), column < HALF
    is_rotated = head < HEADS + KV_HEADS
    at, row = head * DIM + column, y + token.to(tl.int64) * y_stride
    if LIES == "behind":
        wait(PDL)
        low, high = tl.load(row + at, mask=inside, other=0.0), tl.load(row + at + HALF, mask=inside, other=0.0)
    lows = load_b(b, blocks, count, 0, at, half, most, rank_stride, b_stride, RANKS, FACTOR)
    highs = load_b(b, blocks, count, 0, at + HALF, half, most, rank_stride, b_stride, RANKS, FACTOR)
    weight = load_weights(weights, blocks, count, 0, tile, most, TILE, RANKS, LIES)
    if LIES != "behind":
        wait(PDL)
        low, high = tl.load(row + at, mask=inside, other=0.0), tl.load(row + at + HALF, mask=inside, other=0.0)
    shrunk = load_s(s, token_slots, weight, blocks, count, 0, tile, part, most, rank_stride, s_stride, M, TILE, PARTS,
                    RANKS, LIES)  # fmt: skip
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=0)
    cos, sin = load_angles(cos_ptr, sin_ptr, token.to(tl.int64), column, inside & is_rotated, DIM)
    for loop in range(LOOPS):
        more = half & (loop + 1 < LOOPS)
        next_at = at + DIM
        next_low = tl.load(row + next_at, mask=inside & more, other=0.0)
        next_high = tl.load(row + next_at + HALF, mask=inside & more, other=0.0)
        next_lows = load_b(b, blocks, count, 0, next_at, more, most, rank_stride, b_stride, RANKS, FACTOR)
        next_highs = load_b(b, blocks, count, 0, next_at + HALF, more, most, rank_stride, b_stride, RANKS, FACTOR)
        delta = s_by_b(shrunk, lows, s, b, token_slots, weights, blocks, count, tile, part, at, half, most, rank_stride,
                       s_stride, b_stride, M, TILE, PARTS, RANKS, WIDE, LIES, FACTOR, PRECISION)  # fmt: skip
        first = low.to(tl.float32) + delta
        delta = s_by_b(shrunk, highs, s, b, token_slots, weights, blocks, count, tile, part, at + HALF, half,
                       most, rank_stride, s_stride, b_stride, M, TILE, PARTS, RANKS, WIDE, LIES, FACTOR,
                       PRECISION)  # fmt: skip
        second = high.to(tl.float32) + delta
        is_rotated = head < HEADS + KV_HEADS
        weight_low, weight_high, eps = load_head_weights(norm_ptr, eps_ptr, at, half & is_rotated, HALF)
        first, second = rotated(
            first, second, is_rotated, weight_low, weight_high, eps, cos, sin, DIM, norm_ptr is not None, FINITE
        )
        store_heads(q_ptr, k_ptr, v_ptr, k_stride, v_stride, first, second, token.to(tl.int64), head, column, slot,
                    inside, HEADS, KV_HEADS, DIM)  # fmt: skip
        head, at, low, high, lows, highs = head + 1, next_at, next_low, next_high, next_lows, next_highs
