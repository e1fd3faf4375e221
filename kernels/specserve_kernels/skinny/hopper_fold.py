"""The programs of skinny.hopper that multiply x by A, while the others multiply it by W: s = weight · x Aᵀ.

    s[p * TOKENS + token, 16 j + i] = weight[token, slot_j] · x[token] · a[(slot_j * P + p) * R + rank_j + i]

for rank block j of the batch's one tile (see lora.tiles), which belongs to slot_j and begins at rank_j. Dense: zero for
tokens that do not use the slot, and behind the last block up to a multiple of 64. In bfloat16, summed in fp32.

A unit is four blocks of one part, 64 rows of A, and takes the place of a tile of W: the same ring, the same products.
It is parted along `in` into items, so that many programs read a small batch's A at once; the item to arrive last adds
the parts, in their order, weighs them and says in `ready` that the unit is there. Who adds s B at the end of a product
with W waits for that (hopper_lora). They can: these programs have the lowest numbers, so they have begun before any
of the others, and wait for nobody.
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = triton


@gluon.jit
def fence_copies():
    """What was written to memory before by threads is seen by copies of the tensor memory accelerator after."""
    gl.inline_asm_elementwise("fence.proxy.async; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def unit_rows(blocks, unit, count, rank_stride, PARTS: gl.constexpr):
    """The row of A at which each of a unit's four blocks begins; of those behind the last, one that arrives as
    zeros."""
    first, part = unit // PARTS * 4, unit % PARTS
    rows = ()
    for i in gl.static_range(4):
        code = gl.load(blocks + gl.maximum(gl.minimum(first + i, count - 1), 0))
        row = ((code >> 16) * PARTS + part) * rank_stride + (code >> 8 & 0xFF) * 16
        rows += (gl.where(first + i < count, row, 1 << 30),)  # type: ignore[assignment]
    return rows


@gluon.jit
def _copy_a(a_desc, a_smem, bar, rows, column, stage, DEPTH: gl.constexpr, MATRICES: gl.constexpr):
    for i in gl.static_range(DEPTH):
        for block in gl.static_range(4):
            place = (stage * DEPTH + i) * MATRICES * 4 + block
            tma.async_copy_global_to_shared(a_desc, [rows[block], column + i * 64], bar, a_smem.index(place))


@gluon.jit
def _copy_x(x_desc, x_smem, bar, column, stage, DEPTH: gl.constexpr):
    for i in gl.static_range(DEPTH):
        tma.async_copy_global_to_shared(x_desc, [0, column + i * 64], bar, x_smem.index(stage * DEPTH + i))


@gluon.jit
def produce_fold(x_desc, fold, w_smem, x_smem, full, empty, TOKENS: gl.constexpr, DEPTH: gl.constexpr,
                 STAGES: gl.constexpr, MATRICES: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """The copying warp. A does not depend on the kernels before: as much of it as the ring takes comes before x."""
    a_desc, _, _, _, _, _, counts, blocks, _, _, rank_stride, folds, parts, steps = fold
    bytes: gl.constexpr = DEPTH * (64 + TOKENS) * 128
    a_smem = w_smem._reinterpret(w_smem.dtype, [STAGES * DEPTH * MATRICES * 4, 16, 64], w_smem.layout)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    item = gl.program_id(0)
    count = gl.load(counts)
    items = gl.cdiv(count, 4) * PARTS * parts
    filled = gl.where(item < items, gl.minimum(steps, STAGES), 0)
    rows = unit_rows(blocks, item // parts, count, rank_stride, PARTS)
    column = item % parts * steps * (64 * DEPTH)
    for step in range(filled):
        bar = full.index(step)
        mbarrier.expect(bar, bytes)
        _copy_a(a_desc, a_smem, bar, rows, column + step * (64 * DEPTH), step, DEPTH, MATRICES)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for step in range(filled):
        _copy_x(x_desc, x_smem, full.index(step), column + step * (64 * DEPTH), step, DEPTH)
    done = 0
    while item < items:
        rows = unit_rows(blocks, item // parts, count, rank_stride, PARTS)
        column = item % parts * steps * (64 * DEPTH)
        for step in range(filled, steps):
            stage = (done + step) % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((done + step) // STAGES & 1) ^ 1)
            mbarrier.expect(bar, bytes)
            _copy_a(a_desc, a_smem, bar, rows, column + step * (64 * DEPTH), stage, DEPTH, MATRICES)
            _copy_x(x_desc, x_smem, bar, column + step * (64 * DEPTH), stage, DEPTH)
        done += steps
        filled = 0
        item += folds


@gluon.jit
def consume_fold(fold, w_smem, x_smem, full, empty, TOKENS: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
                 MATRICES: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr, PDL: gl.constexpr):  # fmt: skip
    """The computing warps."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    _, _, _, _, _, _, counts, _, _, _, _, folds, parts, steps = fold
    if PDL:
        tl.extra.cuda.gdc_wait()
    item = gl.program_id(0)
    items = gl.cdiv(gl.load(counts), 4) * PARTS * parts
    done = 0
    while item < items:
        product = gl.zeros([64, TOKENS], gl.float32, SUMS)
        for step in range(done, done + steps):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            for i in gl.static_range(DEPTH):
                x = x_smem.index(stage * DEPTH + i).permute((1, 0))
                product = warpgroup_mma(w_smem.index((stage * DEPTH + i) * MATRICES), x, product, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage))
        _finish_item(fold, product, item, TOKENS, PARTS, M)
        done += steps
        item += folds


@gluon.jit
def _add_four(y, part, there, TOKENS: gl.constexpr):
    """y + up to four parts, whose loads are on their way together."""
    one = gl.load(part, mask=there > 0, other=0.0, cache_modifier=".cg")
    two = gl.load(part + 64 * TOKENS, mask=there > 1, other=0.0, cache_modifier=".cg")
    three = gl.load(part + 2 * (64 * TOKENS), mask=there > 2, other=0.0, cache_modifier=".cg")
    four = gl.load(part + 3 * (64 * TOKENS), mask=there > 3, other=0.0, cache_modifier=".cg")
    return (((y + one) + two) + three) + four


@gluon.jit
def _finish_item(fold, product, item, TOKENS: gl.constexpr, PARTS: gl.constexpr, M: gl.constexpr):
    """Store an item's sums; of a unit's last to arrive, store s."""
    # A thread has 4 neighbouring ranks of one token, 16 threads 128 bytes of s.
    STORED: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    _, s, s_stride, workspace, arrivals, ready, counts, blocks, token_slots, token_weights, _, _, parts, _ = fold
    y = gl.convert_layout(product, STORED)
    n = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, STORED)), 1)
    token = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, STORED)), 0)
    unit = item // parts
    place = token * 64 + n
    gl.store(workspace + item * (64 * TOKENS) + place, y)
    gl.thread_barrier()
    if gl.atomic_add(arrivals + unit, 1, sem="acq_rel", scope="gpu") == parts - 1:
        # Others wrote these: past the first-level cache.
        first_part = workspace + unit * parts * (64 * TOKENS) + place
        y = gl.zeros([64, TOKENS], gl.float32, STORED)
        if TOKENS <= 32:
            for i in range(0, parts, 4):
                y = _add_four(y, first_part + i * (64 * TOKENS), parts - i, TOKENS)
        else:  # registers for one at a time
            for i in range(0, parts):
                y += gl.load(first_part + i * (64 * TOKENS), cache_modifier=".cg")
        count, first = gl.load(counts), unit // PARTS * 4
        code = gl.load(blocks + gl.minimum(first + n // 16, count - 1))
        slot = gl.where(first + n // 16 < count, code >> 16, -2)
        weight = gl.zeros([64, TOKENS], gl.float32, STORED)
        used = weight > 0.0
        for m in gl.static_range(M):
            hit = gl.load(token_slots + token * M + m) == slot
            weight += gl.where(hit, gl.load(token_weights + token * M + m), 0.0)
            used = used | hit
        row = unit % PARTS * TOKENS + token
        y = gl.where(used, y * weight, 0.0)
        gl.store(s + row * s_stride + first * 16 + n, y.to(s.dtype.element_ty))
        fence_copies()
        gl.atomic_xchg(arrivals + unit, 0, sem="relaxed", scope="gpu")
        gl.thread_barrier()
        gl.atomic_add(ready, 1, sem="release", scope="gpu")
