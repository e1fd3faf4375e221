"""How skinny.hopper adds adapters to a product with W: y += s B in further steps of the ring, onto the same sums.

A step takes 64 DEPTH (gated: half as many) of the ranks that the tokens' adapters use, dense (see hopper_fold). Where
an earlier step had its tiles of x and W lie tiles of s [TOKENS, 64 ranks] and of B [64 ranks, 64 columns], the latter
copied in boxes of 16 ranks, one a rank block. Gated: s and B of both halves; where a step has one tile of x (DEPTH 1),
of one half and then of the other. s is there once `ready` says so: the programs that compute it do so while W streams.

A part of `in` other than the first has no such steps: were blocks shared among the parts, the order of a token's sums
would depend on its neighbours' blocks. A product whose tokens have no adapter has none at all.
"""

from __future__ import annotations

from specserve_kernels.language import triton
from specserve_kernels.skinny.hopper_fold import fence_copies

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = triton


@gluon.jit
def adapter_steps(counts, program, DEPTH: gl.constexpr, SPLITS: gl.constexpr, GATED: gl.constexpr):
    """(rank blocks in use, this program's steps for them)."""
    count = gl.load(counts)
    HALVES: gl.constexpr = 2 if GATED and DEPTH == 1 else 1
    steps = gl.cdiv(count, 4 * DEPTH * HALVES // (2 if GATED else 1)) * HALVES
    if SPLITS > 1:
        steps = gl.where(program % SPLITS == 0, steps, 0)
    return count, steps


@gluon.jit
def _rank_rows(blocks, first, count, rank_stride, BLOCKS: gl.constexpr):
    """The row of B at which each of BLOCKS rank blocks begins; of those behind the last, one that arrives as zeros."""
    rows = ()
    for i in gl.static_range(BLOCKS):
        code = gl.load(blocks + gl.minimum(first + i, count - 1))
        row = (code >> 16) * rank_stride + (code >> 8 & 0xFF) * 16
        rows += (gl.where(first + i < count, row, 1 << 30),)  # type: ignore[assignment]
    return rows


@gluon.jit
def _rows_of_s(column, second, third, fourth, TOKENS: gl.constexpr):
    """The first row of s for the part that a column of y belongs to."""
    return ((column >= second).to(gl.int32) + (column >= third).to(gl.int32) + (column >= fourth).to(gl.int32)) * TOKENS


@gluon.jit
def _wait_for(ready, units):
    """Until so many units of s are there."""
    there = gl.atomic_add(ready, 0, sem="acquire", scope="gpu")
    while there < units:
        there = gl.atomic_add(ready, 0, sem="acquire", scope="gpu")
    fence_copies()


@gluon.jit
def produce_adapters(adapters, w_smem, x_smem, full, empty, program, out_dim, steps, TOKENS: gl.constexpr,
                     SPLITS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
                     PARTS: gl.constexpr):  # fmt: skip
    """The copying warp, after W's `steps` steps."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    BLOCKS: gl.constexpr = 4 * DEPTH // MATRICES
    b_desc, s_desc, ready, counts, blocks, rank_stride, second, third, fourth = adapters
    b_smem = w_smem._reinterpret(w_smem.dtype, [STAGES * DEPTH * MATRICES * 4, 16, 64], w_smem.layout)
    column = program // SPLITS * 64
    s_row = _rows_of_s(column, second, third, fourth, TOKENS)
    up_row = _rows_of_s(out_dim + column, second, third, fourth, TOKENS)
    count, more = adapter_steps(counts, program, DEPTH, SPLITS, GATED)
    for further in range(more):
        rows = _rank_rows(blocks, further * BLOCKS, count, rank_stride, BLOCKS)
        step = steps + further
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar, BLOCKS * MATRICES * 2048 + DEPTH * TOKENS * 128)
        for i in gl.static_range(BLOCKS):
            place = (stage * DEPTH + i // 4) * MATRICES * 4 + i % 4
            tma.async_copy_global_to_shared(b_desc, [rows[i], column], bar, b_smem.index(place))
            if GATED:
                tma.async_copy_global_to_shared(b_desc, [rows[i], out_dim + column], bar, b_smem.index(place + 4))
        if further == 0:
            _wait_for(ready, gl.cdiv(count, 4) * PARTS)
        for i in gl.static_range(DEPTH // MATRICES):
            rank = (further * (DEPTH // MATRICES) + i) * 64
            rank = gl.where(rank < count * 16, rank, 1 << 30)  # behind the last: zeros, whatever s holds there
            place = stage * DEPTH + i * MATRICES
            tma.async_copy_global_to_shared(s_desc, [s_row, rank], bar, x_smem.index(place))
            if GATED:
                tma.async_copy_global_to_shared(s_desc, [up_row, rank], bar, x_smem.index(place + 1))


@gluon.jit
def produce_halves(adapters, w_smem, x_smem, full, empty, program, out_dim, steps, TOKENS: gl.constexpr,
                   SPLITS: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """produce_adapters of a gated product of DEPTH 1: even steps for the gate, odd ones for what it multiplies."""
    b_desc, s_desc, ready, counts, blocks, rank_stride, second, third, fourth = adapters
    b_smem = w_smem._reinterpret(w_smem.dtype, [STAGES * 8, 16, 64], w_smem.layout)
    count, more = adapter_steps(counts, program, 1, SPLITS, True)
    for further in range(more):
        rows = _rank_rows(blocks, further // 2 * 4, count, rank_stride, 4)
        column = further % 2 * out_dim + program // SPLITS * 64
        step = steps + further
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar, 4 * 2048 + TOKENS * 128)
        for i in gl.static_range(4):
            tma.async_copy_global_to_shared(b_desc, [rows[i], column], bar, b_smem.index(stage * 8 + i))
        if further == 0:
            _wait_for(ready, gl.cdiv(count, 4) * PARTS)
        s_row = _rows_of_s(column, second, third, fourth, TOKENS)
        tma.async_copy_global_to_shared(s_desc, [s_row, further // 2 * 64], bar, x_smem.index(stage))


@gluon.jit
def multiply_half(w_smem, x_smem, stage, sums):
    """The product of such a step, done."""
    b, s = w_smem.index(stage * 2).permute((1, 0)), x_smem.index(stage).permute((1, 0))
    sums = warpgroup_mma(b, s, sums, is_async=True)
    return warpgroup_mma_wait(0, deps=(sums,))


@gluon.jit
def multiply_adapters(w_smem, x_smem, stage, first, second, DEPTH: gl.constexpr, GATED: gl.constexpr):
    """Start the products of one step: columns of B are what rows of W are."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    for i in gl.static_range(DEPTH // MATRICES):
        b = w_smem.index((stage * DEPTH + i) * MATRICES).permute((1, 0))
        s = x_smem.index(stage * DEPTH + i * MATRICES).permute((1, 0))
        first = warpgroup_mma(b, s, first, is_async=True)
        if GATED:
            b = w_smem.index((stage * DEPTH + i) * MATRICES + 1).permute((1, 0))
            s = x_smem.index(stage * DEPTH + i * MATRICES + 1).permute((1, 0))
            second = warpgroup_mma(b, s, second, is_async=True)
    return first, second if GATED else first
