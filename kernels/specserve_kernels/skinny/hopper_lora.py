"""What the warps of skinny.hopper do for adapters: y += Σ s · B in further steps of the ring, onto the same sums.

A step takes 64 DEPTH (gated: half as many) of all ranks that the tokens' adapters use, treated densely. Where an
earlier step had its tiles of W lie tiles of B [64 ranks, 64 columns], copied in boxes of 16 ranks, one a rank block
(see lora.tiles). s of the columns' part, tiles [TOKENS, 64 ranks], has a ring of its own of SLOTS steps: two warps sum
the splits, round the sums to x's dtype and lay them there while W still streams, zeros where a token does not use the
block's slot. Gated: B and s of both halves. All that is read here was written in this step, so nothing before the wait.

A part of `in` other than the first has no such steps: were blocks shared among the parts, the order of a token's sums
would depend on its neighbours' blocks. A product whose tokens have no adapter has none at all.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = triton


@gluon.jit
def adapter_steps(counts, DEPTH: gl.constexpr, SPLITS: gl.constexpr, GATED: gl.constexpr):
    """(rank blocks in use, this program's steps for them)."""
    count = gl.load(counts)
    steps = gl.cdiv(count, 4 * DEPTH // (2 if GATED else 1))
    if SPLITS > 1:
        steps = gl.where(gl.program_id(0) % SPLITS == 0, steps, 0)
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
def produce_b(adapters, w_smem, full, empty, out_dim, steps, SPLITS: gl.constexpr, DEPTH: gl.constexpr,
              STAGES: gl.constexpr, GATED: gl.constexpr):  # fmt: skip
    """The copying warp, after W's `steps` steps."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    BLOCKS: gl.constexpr = 4 * DEPTH // MATRICES
    b_desc, _, _, counts, blocks, _, rank_stride, _, _, _ = adapters
    b_smem = w_smem._reinterpret(w_smem.dtype, [STAGES * DEPTH * MATRICES * 4, 16, 64], w_smem.layout)
    column = gl.program_id(0) // SPLITS * 64
    count, more = adapter_steps(counts, DEPTH, SPLITS, GATED)
    for further in range(more):
        rows = _rank_rows(blocks, further * BLOCKS, count, rank_stride, BLOCKS)
        step = steps + further
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar, BLOCKS * MATRICES * 2048)
        for i in gl.static_range(BLOCKS):
            place = (stage * DEPTH + i // 4) * MATRICES * 4 + i % 4
            tma.async_copy_global_to_shared(b_desc, [rows[i], column], bar, b_smem.index(place))
            if GATED:
                tma.async_copy_global_to_shared(b_desc, [rows[i], out_dim + column], bar, b_smem.index(place + 4))


@gluon.jit
def _gather_s(adapters, first, count, part, dtype: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr,
              M: gl.constexpr, S_SPLITS: gl.constexpr):  # fmt: skip
    """s [TOKENS, 64] of four rank blocks. A thread loads 4 ranks of a token."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [2, 1], [1, 0])
    _, s, token_slots, _, blocks, split_stride, rank_stride, _, _, _ = adapters
    k = gl.arange(0, 64, gl.SliceLayout(0, layout))
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
    code = gl.load(blocks + gl.minimum(first + k // 16, count - 1))
    slot = gl.expand_dims(gl.where(first + k // 16 < count, code >> 16, -2), 0)
    rank = gl.expand_dims((code >> 8 & 0xFF) * 16 + k % 16, 0)
    place = gl.full([TOKENS, 64], -1, gl.int32, layout)
    for m in gl.static_range(M):
        named = gl.expand_dims(gl.load(token_slots + token * M + m), 1)
        place = gl.where(named == slot, m, place)
    at = ((gl.expand_dims(token * M, 1) + place) * PARTS + part) * rank_stride + rank
    at = gl.max_contiguous(gl.multiple_of(at, (1, 4)), (1, 4))
    used = gl.max_constancy(place >= 0, (1, 4))
    # Others wrote these while this kernel already ran: past the first-level cache.
    total = gl.load(s + at, mask=used, other=0.0, cache_modifier=".cg")
    for split in gl.static_range(1, S_SPLITS):
        total += gl.load(s + split * split_stride + at, mask=used, other=0.0, cache_modifier=".cg")
    return total.to(dtype)


@gluon.jit
def stage_s(adapters, s_smem, staged, taken, TOKENS: gl.constexpr, DEPTH: gl.constexpr, SLOTS: gl.constexpr,
            SPLITS: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr,
            S_SPLITS: gl.constexpr):  # fmt: skip
    """The staging warps. `staged` of a slot says that s lies there, `taken` that it was used."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    dtype: gl.constexpr = s_smem.dtype
    _, _, _, counts, _, _, _, second, third, fourth = adapters
    if PDL:
        tl.extra.cuda.gdc_wait()
    column = gl.program_id(0) // SPLITS * 64
    part = 0
    if not GATED:
        part = (column >= second).to(gl.int32) + (column >= third).to(gl.int32) + (column >= fourth).to(gl.int32)
    count, more = adapter_steps(counts, DEPTH, SPLITS, GATED)
    for further in range(more):
        slot = further % SLOTS
        mbarrier.wait(taken.index(slot), (further // SLOTS & 1) ^ 1)
        for i in range(DEPTH):
            first = (further * DEPTH + i) // MATRICES * 4
            of = part + (i % MATRICES if PARTS > 1 else 0)
            s = _gather_s(adapters, first, count, of, dtype, TOKENS, PARTS, M, S_SPLITS)
            s_smem.index(slot * DEPTH + i).store(s)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(staged.index(slot))


@gluon.jit
def multiply_b(w_smem, s_smem, stage, slot, first, second, DEPTH: gl.constexpr, GATED: gl.constexpr):
    """Start the products of one step: columns of B are what rows of W are."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    for i in gl.static_range(DEPTH // MATRICES):
        b = w_smem.index((stage * DEPTH + i) * MATRICES).permute((1, 0))
        s = s_smem.index(slot * DEPTH + i * MATRICES).permute((1, 0))
        first = warpgroup_mma(b, s, first, is_async=True)
        if GATED:
            b = w_smem.index((stage * DEPTH + i) * MATRICES + 1).permute((1, 0))
            s = s_smem.index(slot * DEPTH + i * MATRICES + 1).permute((1, 0))
            second = warpgroup_mma(b, s, second, is_async=True)
    return first, second if GATED else first
