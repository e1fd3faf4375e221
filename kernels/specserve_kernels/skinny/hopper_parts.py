"""What the warps of skinny_hopper do: one warp copies tiles of W and x, four warps multiply and store.

A stage of the ring holds DEPTH tiles along `in`: of W [ROWS, 64] (gated: of Wg, then of Wu) and of x [TOKENS, 64]. Its
barrier `full` counts the bytes that came, `empty` says that they were used.

A product that LEAVES something for the norm behind it does so as it stores its tile; one that is NORMED takes what was
left, and multiplies its sums by the norm's factor (see skinny.ahead).
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.skinny.hopper_lora import (
    adapter_steps,
    multiply_adapters,
    multiply_half,
    produce_adapters,
    produce_halves,
)

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = triton


@gluon.jit
def _copy_w(w_desc, w_smem, bar, row, column, stage, out_dim, DEPTH: gl.constexpr, GATED: gl.constexpr):
    MATRICES: gl.constexpr = 2 if GATED else 1
    for i in gl.static_range(DEPTH):
        place = (stage * DEPTH + i) * MATRICES
        tma.async_copy_global_to_shared(w_desc, [row, column + i * 64], bar, w_smem.index(place))
        if GATED:
            tma.async_copy_global_to_shared(w_desc, [out_dim + row, column + i * 64], bar, w_smem.index(place + 1))


@gluon.jit
def _copy_x(x_desc, x_smem, bar, column, stage, DEPTH: gl.constexpr):
    for i in gl.static_range(DEPTH):
        tma.async_copy_global_to_shared(x_desc, [0, column + i * 64], bar, x_smem.index(stage * DEPTH + i))


@gluon.jit
def produce(w_desc, x_desc, adapters, w_smem, x_smem, full, empty, program, out_dim, steps,
            ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
            SPLITS: gl.constexpr, GATED: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """The copying warp. Columns of x and W beyond the end arrive as zeros."""
    bytes: gl.constexpr = DEPTH * ((2 if GATED else 1) * ROWS + TOKENS) * 128
    row = program // SPLITS * ROWS
    column = program % SPLITS * steps * (64 * DEPTH)
    filled = gl.minimum(steps, STAGES)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for step in range(filled):
        bar = full.index(step)
        mbarrier.expect(bar, bytes)
        _copy_w(w_desc, w_smem, bar, row, column + step * (64 * DEPTH), step, out_dim, DEPTH, GATED)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(filled):
        _copy_x(x_desc, x_smem, full.index(step), column + step * (64 * DEPTH), step, DEPTH)
    for step in range(filled, steps):
        stage = step % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar, bytes)
        _copy_w(w_desc, w_smem, bar, row, column + step * (64 * DEPTH), stage, out_dim, DEPTH, GATED)
        _copy_x(x_desc, x_smem, bar, column + step * (64 * DEPTH), stage, DEPTH)
    if PARTS > 0:
        if GATED and DEPTH == 1:
            produce_halves(
                adapters, w_smem, x_smem, full, empty, program, out_dim, steps, TOKENS, SPLITS, STAGES, PARTS
            )
        else:
            produce_adapters(
                adapters, w_smem, x_smem, full, empty, program, out_dim, steps, TOKENS, SPLITS, DEPTH, STAGES, GATED,
                PARTS,
            )  # fmt: skip


@gluon.jit
def _multiply(w_smem, x_smem, step, first, second, DEPTH: gl.constexpr, STAGES: gl.constexpr,
              GATED: gl.constexpr):  # fmt: skip
    """Start the products of one stage."""
    MATRICES: gl.constexpr = 2 if GATED else 1
    stage = step % STAGES
    for i in gl.static_range(DEPTH):
        place = stage * DEPTH + i
        x = x_smem.index(place).permute((1, 0))
        first = warpgroup_mma(w_smem.index(place * MATRICES), x, first, is_async=True)
        second = warpgroup_mma(w_smem.index(place * MATRICES + 1), x, second, is_async=True) if GATED else first
    return first, second


@gluon.jit
def _finish(first, second, GATED: gl.constexpr):
    """The sums, all products of them done."""
    if GATED:
        first, second = warpgroup_mma_wait(0, deps=(first, second))
    else:
        first = warpgroup_mma_wait(0, deps=(first,))
        second = first
    return first, second


@gluon.jit
def _add_parts(y, workspace, arrival, inside, place, size, program, SPLITS: gl.constexpr):
    """Store this part's sums. The last to arrive: all parts' sum, and True."""
    gl.store(workspace + program % SPLITS * size + place, y, mask=inside)
    gl.thread_barrier()
    last = gl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        # Others wrote these: past the first-level cache.
        y = gl.load(workspace + place, mask=inside, other=0.0, cache_modifier=".cg")
        for i in gl.static_range(1, SPLITS):
            y += gl.load(workspace + i * size + place, mask=inside, other=0.0, cache_modifier=".cg")
        gl.atomic_xchg(arrival, 0, sem="relaxed", scope="gpu")
    return y, last


@gluon.jit
def _add_adapters(w_smem, x_smem, full, empty, first, second, steps, more, DEPTH: gl.constexpr, STAGES: gl.constexpr,
                  GATED: gl.constexpr):  # fmt: skip
    """The sums after the steps behind W's, all products of them done."""
    if GATED and DEPTH == 1:
        one, two = _finish(first, second, GATED)
        mbarrier.arrive(empty.index((steps - 1) % STAGES))
        for step in range(steps, steps + more, 2):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            one = multiply_half(w_smem, x_smem, step % STAGES, one)
            mbarrier.arrive(empty.index(step % STAGES))
            mbarrier.wait(full.index((step + 1) % STAGES), (step + 1) // STAGES & 1)
            two = multiply_half(w_smem, x_smem, (step + 1) % STAGES, two)
            mbarrier.arrive(empty.index((step + 1) % STAGES))
    else:
        for step in range(steps, steps + more):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            done, done_too = _finish(first, second, GATED)
            mbarrier.arrive(empty.index((step - 1) % STAGES))
            first, second = multiply_adapters(w_smem, x_smem, step % STAGES, done, done_too, DEPTH, GATED)
        one, two = _finish(first, second, GATED)
    return one, two


@gluon.jit
def _sums(w_smem, x_smem, full, empty, first, second, steps, more, DEPTH: gl.constexpr, STAGES: gl.constexpr,
          GATED: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """first and second plus all products of W's `steps` and the `more` of adapters behind them."""
    mbarrier.wait(full.index(0), 0)
    first, second = _multiply(w_smem, x_smem, 0, first, second, DEPTH, STAGES, GATED)
    for step in range(1, steps):
        mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
        one, two = _finish(first, second, GATED)
        mbarrier.arrive(empty.index((step - 1) % STAGES))
        first, second = _multiply(w_smem, x_smem, step, one, two, DEPTH, STAGES, GATED)
    if PARTS > 0:
        y, up = _add_adapters(w_smem, x_smem, full, empty, first, second, steps, more, DEPTH, STAGES, GATED)
    else:
        y, up = _finish(first, second, GATED)
    return y, up


@gluon.jit
def _factors(norm, TOKENS: gl.constexpr, WANTED: gl.constexpr):
    """rsqrt(mean(h²) + eps) of each row [TOKENS], from the sums of squares that the tiles before left."""
    LOADED: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    _, _, squares, eps, tiles, size = norm
    tile = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LOADED)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, LOADED)), 0)
    total = gl.zeros([TOKENS], gl.float32, gl.SliceLayout(0, LOADED))
    for first in range(0, tiles, 64):
        some = gl.load(squares + (first + tile) * TOKENS + token, mask=first + tile < tiles, other=0.0)
        total += gl.sum(some, 0)
    factors = 1.0 / gl.sqrt(total / size + gl.load(eps))
    return gl.convert_layout(factors, gl.SliceLayout(0, WANTED))


@gluon.jit
def _leave(norm, y, inside, n, token, tile, out_dim, TOKENS: gl.constexpr, STORED: gl.constexpr):
    """Of rows y [ROWS, TOKENS], as they were stored: y * g, and the sums of their squares."""
    gain, scaled, squares, _, _, _ = norm
    value = gl.where(inside, y.to(gl.float32), 0.0)
    weight = gl.load(gain + n, mask=n < out_dim, other=0.0).to(gl.float32)
    gl.store(scaled + token * out_dim + n, (value * weight).to(scaled.dtype.element_ty), mask=inside)
    at = tile * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(0, STORED))
    gl.store(squares + at, gl.sum(value * value, 0))


@gluon.jit
def consume(out, workspace, arrivals, counts, norm, w_smem, x_smem, full, empty, program, count, out_dim, steps,
            out_stride, ROWS: gl.constexpr, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
            SPLITS: gl.constexpr, GATED: gl.constexpr, RESIDUAL: gl.constexpr, LEAVES: gl.constexpr,
            NORMED: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """The computing warps: sums [ROWS, TOKENS] of W xᵀ, then what follows on them. norm: (g, h * g, sums of squares,
    eps, tiles and columns of h); those used that LEAVES or NORMED needs."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    # A thread stores 4 neighbours of one row of y, 16 threads 128 bytes.
    STORED: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    first = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
    second = gl.zeros([ROWS, TOKENS], gl.float32, SUMS)
    if PDL and (PARTS > 0 or NORMED):
        tl.extra.cuda.gdc_wait()
    more = adapter_steps(counts, program, DEPTH, SPLITS, GATED)[1] if PARTS > 0 else 0
    if NORMED:
        factors = _factors(norm, TOKENS, SUMS if GATED else STORED)
    y, up = _sums(w_smem, x_smem, full, empty, first, second, steps, more, DEPTH, STAGES, GATED, PARTS)
    if GATED:
        if NORMED:
            y, up = y * gl.expand_dims(factors, 0), up * gl.expand_dims(factors, 0)
        y = y / (1.0 + gl.exp(-y)) * up
    y = gl.convert_layout(y, STORED)
    tile = program // SPLITS
    n = gl.expand_dims(tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, STORED)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, STORED)), 0)
    inside = (n < out_dim) & (token < count)
    if PDL:
        tl.extra.cuda.gdc_wait()
    stores = True
    if SPLITS > 1:
        at = token * out_dim + n
        y, stores = _add_parts(y, workspace, arrivals + tile, inside, at, count * out_dim, program, SPLITS)
    if stores:
        if NORMED and not GATED:
            y *= gl.expand_dims(factors, 0)
        place = out + token * out_stride + n
        if RESIDUAL:
            y += gl.load(place, mask=inside, other=0.0).to(gl.float32)
        stored = y.to(out.dtype.element_ty)
        gl.store(place, stored, mask=inside)
        if LEAVES:
            _leave(norm, stored, inside, n, token, tile, out_dim, TOKENS, STORED)
