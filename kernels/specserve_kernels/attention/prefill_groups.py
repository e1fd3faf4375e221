"""What the groups of warps of attention_prefill_hopper do: one warp copies keys and values, two groups compute.

In shared memory a tile of K, V or Q is cut into HALVES of 64 numbers of head_dim: rows of 128 bytes, so that 8 rows are
one period of the swizzle, and a page can be copied to wherever its keys belong in the tile. STAGES tiles of K and of V
are on their way or in use; of each, the barrier `full` counts the bytes that came and `empty` the groups that are done.
"""

from __future__ import annotations

from specserve_kernels.language import triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:  # importing works everywhere, launching only where there is Triton
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = triton


@gluon.jit
def _copy(desc, smem, full, empty, phase, stage, first, table, last_page, column, HALVES: gl.constexpr,
          BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BLOCK_SIZE: gl.constexpr):  # fmt: skip
    """Copy the keys first … first + BLOCK_N − 1, once the stage is free; pages beyond the last one repeat it."""
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HALVES * 128)
    for page in gl.static_range(BLOCK_N // PAGE):
        key = first + page * PAGE
        block = gl.load(table + gl.minimum(key // BLOCK_SIZE, last_page)).to(gl.int32)
        slot = block * BLOCK_SIZE + key % BLOCK_SIZE
        for half in gl.static_range(HALVES):
            place = smem.index(stage * HALVES + half).slice(page * PAGE, PAGE, dim=0)
            tma.async_copy_global_to_shared(desc, [slot, column + half * 64], full.index(stage), place)


@gluon.jit
def _tile(tiles, item, items, KV_HEADS: gl.constexpr, FIELDS: gl.constexpr):
    """Where the record of an item lies, and its KV head.

    Programs with several items take all heads of the longest tiles first, and every second round goes backwards: who
    took the most of the last one takes the least of this one. Where each has one, head after head stays in the cache.
    How many items there are is known to the device alone: there may be fewer than programs, or none.
    """
    programs = gl.num_programs(0)
    turn = item // programs
    back = (turn % 2 == 1) & ((turn + 1) * programs <= items)
    place = gl.where(back, (2 * turn + 1) * programs - 1 - item, item)
    count = gl.maximum(items // KV_HEADS, 1)
    single = programs >= items
    tile = gl.where(single, place % count, place // KV_HEADS)
    return tiles + tile * FIELDS, gl.where(single, place // count, place % KV_HEADS)


@gluon.jit
def produce(k_desc, v_desc, tiles, block_tables, k_smem, v_smem, k_full, k_empty, v_full, v_empty, items, table_stride,
            KV_HEADS: gl.constexpr, FIELDS: gl.constexpr, HALVES: gl.constexpr,
            BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """The loading warp: it runs ahead into the next item as far as there are free stages."""
    step = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, kv_head = _tile(tiles, item, items, KV_HEADS, FIELDS)
        table = block_tables + gl.load(tile + 4).to(gl.int64) * table_stride
        stop = gl.load(tile + 5)
        last_page = (stop - 1) // BLOCK_SIZE
        column = kv_head * (HALVES * 64)
        for first in range(0, stop, BLOCK_N):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            _copy(k_desc, k_smem, k_full, k_empty, phase, stage, first, table, last_page, column,
                  HALVES, BLOCK_N, PAGE, BLOCK_SIZE)  # fmt: skip
            _copy(v_desc, v_smem, v_full, v_empty, phase, stage, first, table, last_page, column,
                  HALVES, BLOCK_N, PAGE, BLOCK_SIZE)  # fmt: skip
            step += 1


@gluon.jit
def _multiply_keys(q_smem, k_smem, k_full, step, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr,
                   STAGES: gl.constexpr, GROUP: gl.constexpr, SCORES: gl.constexpr):  # fmt: skip
    """Start q · Kᵀ of one tile, once its keys are there."""
    stage = step % STAGES
    mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    for half in gl.static_range(HALVES):
        keys = k_smem.index(stage * HALVES + half).permute((1, 0))
        scores = warpgroup_mma(q_smem.index(GROUP * HALVES + half), keys, scores, use_acc=half > 0, is_async=True)
    return scores


@gluon.jit
def _multiply_values(weights, v_smem, v_full, step, left, right, HALVES: gl.constexpr, STAGES: gl.constexpr):
    """Start weights · V of one tile, once its values are there."""
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
    left = warpgroup_mma(weights, v_smem.index(stage * HALVES), left, is_async=True)
    if HALVES == 2:
        right = warpgroup_mma(weights, v_smem.index(stage * HALVES + 1), right, is_async=True)
    return left, right


@gluon.jit
def _finish_values(weights, left, right, HALVES: gl.constexpr):
    """Wait for all products; `weights` must live until then."""
    if HALVES == 2:
        left, right, weights = warpgroup_mma_wait(0, deps=(left, right, weights))
    else:
        left, weights = warpgroup_mma_wait(0, deps=(left, weights))
    return left, right


@gluon.jit
def _weigh(scores, total, peak, at, first, lowest, scale, BLOCK_N: gl.constexpr, SCORES: gl.constexpr):
    """Softmax of a tile: its weights, the factor for what came before, and the new running sums."""
    if first + BLOCK_N > lowest + 1:
        keys = gl.expand_dims(first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)), 0)
        scores = gl.where(keys <= gl.expand_dims(at, 1), scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_peak, 1))
    decay = gl.exp2(peak - new_peak)
    return weights, decay, total * decay + gl.sum(weights, 1), new_peak


@gluon.jit
def _rows(tile, kv_head, GROUPS: gl.constexpr, HALVES: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    """Token, place in a token (numbers) and existence of a computing group's rows."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    query = gl.load(tile + 1) + GROUP * (ROWS // GROUPS) + row // GROUPS
    real = (row // GROUPS < ROWS // GROUPS) & (query < gl.load(tile + 2))
    token = (gl.load(tile) + query).to(gl.int64)
    return token, (kv_head * GROUPS + row % GROUPS) * (HALVES * 64), real


@gluon.jit
def _load_queries(q_ptr, tile, kv_head, q_stride, GROUPS: gl.constexpr, HALVES: gl.constexpr, ROWS: gl.constexpr,
                  GROUP: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token, heads, real = _rows(tile, kv_head, GROUPS, HALVES, ROWS, GROUP, layout)
    dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    places = q_ptr + gl.expand_dims(token * q_stride + heads, 1) + dims
    mask = gl.expand_dims(real, 1)
    left = gl.load(places, mask=mask, other=0.0)
    right = left
    if HALVES == 2:
        right = gl.load(places + 64, mask=mask, other=0.0)
    return left, right


@gluon.jit
def _put_queries(left, right, q_smem, HALVES: gl.constexpr, GROUP: gl.constexpr):
    gl.thread_barrier()  # all warps of the group are done with the last item's queries
    q_smem.index(GROUP * HALVES).store(left)
    if HALVES == 2:
        q_smem.index(GROUP * HALVES + 1).store(right)
    fence_async_shared()


@gluon.jit
def _positions(tile, GROUPS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, SCORES: gl.constexpr):
    """Positions of a computing group's rows, and the lowest of them; rows beyond the sequence repeat its last query."""
    first_query = gl.load(tile + 1) + GROUP * (ROWS // GROUPS)
    last_query = gl.load(tile + 2) - 1
    base = gl.load(tile + 3)
    query = first_query + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) // GROUPS
    return base + gl.minimum(query, last_query), base + gl.minimum(first_query, last_query)


@gluon.jit
def _store(acc, total, half, out_ptr, tile, kv_head, out_stride, GROUPS: gl.constexpr, HALVES: gl.constexpr,
           ROWS: gl.constexpr, GROUP: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    token, heads, real = _rows(tile, kv_head, GROUPS, HALVES, ROWS, GROUP, ACC)
    dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, ACC)), 0)
    places = out_ptr + gl.expand_dims(token * out_stride + heads + half * 64, 1) + dims
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, ACC)), 1)
    gl.store(places, acc.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(real, 1))


@gluon.jit
def consume(q_ptr, out_ptr, tiles, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, items, scale, q_stride,
            out_stride, KV_HEADS: gl.constexpr, FIELDS: gl.constexpr, GROUPS: gl.constexpr,
            HALVES: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
            GROUP: gl.constexpr):  # fmt: skip
    """A computing group of four warps."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    step = 0  # tiles of keys so far, of all items
    # A program without an item looks at the last one's queries, and where there is none at all, at the first record.
    tile, kv_head = _tile(tiles, gl.maximum(gl.minimum(gl.program_id(0), items - 1), 0), items, KV_HEADS, FIELDS)
    q_left, q_right = _load_queries(q_ptr, tile, kv_head, q_stride, GROUPS, HALVES, ROWS, GROUP)
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile, kv_head = _tile(tiles, item, items, KV_HEADS, FIELDS)
        _put_queries(q_left, q_right, q_smem, HALVES, GROUP)
        at, lowest = _positions(tile, GROUPS, ROWS, GROUP, SCORES)
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        left = gl.zeros([ROWS, 64], gl.float32, ACC)
        right = gl.zeros([ROWS, 64], gl.float32, ACC)

        scores = _multiply_keys(q_smem, k_smem, k_full, step, ROWS, BLOCK_N, HALVES, STAGES, GROUP, SCORES)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(step % STAGES))
        weights, decay, total, peak = _weigh(scores, total, peak, at, 0, lowest, scale, BLOCK_N, SCORES)
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
        for first in range(BLOCK_N, gl.load(tile + 5), BLOCK_N):
            scores = _multiply_keys(q_smem, k_smem, k_full, step + 1, ROWS, BLOCK_N, HALVES, STAGES, GROUP, SCORES)
            left, right = _multiply_values(operand, v_smem, v_full, step, left, right, HALVES, STAGES)
            scores = warpgroup_mma_wait(HALVES, deps=(scores,))  # the values' products go on
            mbarrier.arrive(k_empty.index((step + 1) % STAGES))
            weights, decay, total, peak = _weigh(scores, total, peak, at, first, lowest, scale, BLOCK_N, SCORES)
            left, right = _finish_values(operand, left, right, HALVES)
            mbarrier.arrive(v_empty.index(step % STAGES))
            shrink = gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
            left = left * shrink
            right = right * shrink
            operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
            step += 1
        left, right = _multiply_values(operand, v_smem, v_full, step, left, right, HALVES, STAGES)
        following = gl.minimum(item + gl.num_programs(0), items - 1)  # its queries come while this one is finished
        next_tile, next_head = _tile(tiles, following, items, KV_HEADS, FIELDS)
        q_left, q_right = _load_queries(q_ptr, next_tile, next_head, q_stride, GROUPS, HALVES, ROWS, GROUP)
        left, right = _finish_values(operand, left, right, HALVES)
        mbarrier.arrive(v_empty.index(step % STAGES))
        step += 1
        _store(left, total, 0, out_ptr, tile, kv_head, out_stride, GROUPS, HALVES, ROWS, GROUP, ACC)
        if HALVES == 2:
            _store(right, total, 1, out_ptr, tile, kv_head, out_stride, GROUPS, HALVES, ROWS, GROUP, ACC)
