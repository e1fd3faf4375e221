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
def produce(k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, table, start, stop, last_page, column,
             HALVES: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr, BLOCK_SIZE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """The loading warp."""
    for first in range(start, stop, BLOCK_N):
        step = (first - start) // BLOCK_N
        stage = step % STAGES
        phase = (step // STAGES) & 1
        _copy(k_desc, k_smem, k_full, k_empty, phase, stage, first, table, last_page, column,
              HALVES, BLOCK_N, PAGE, BLOCK_SIZE)  # fmt: skip
        _copy(v_desc, v_smem, v_full, v_empty, phase, stage, first, table, last_page, column,
              HALVES, BLOCK_N, PAGE, BLOCK_SIZE)  # fmt: skip


@gluon.jit
def _multiply_keys(q_smem, k_smem, stage, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr,
                   GROUP: gl.constexpr, SCORES: gl.constexpr):  # fmt: skip
    """Start q · Kᵀ of one tile."""
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    for half in gl.static_range(HALVES):
        keys = k_smem.index(stage * HALVES + half).permute((1, 0))
        scores = warpgroup_mma(q_smem.index(GROUP * HALVES + half), keys, scores, use_acc=half > 0, is_async=True)
    return scores


@gluon.jit
def _multiply_values(weights, v_smem, stage, left, right, HALVES: gl.constexpr):
    """Start weights · V of one tile."""
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
def _weigh(scores, total, peak, at, first, lowest, highest, window, scale, BLOCK_N: gl.constexpr,
           WINDOWED: gl.constexpr, SCORES: gl.constexpr):  # fmt: skip
    """Softmax of a tile: its weights, the factor for what came before, and the new running sums."""
    partial = first + BLOCK_N > lowest + 1
    if WINDOWED:
        partial = partial | (first <= highest - window)
    if partial:
        keys = gl.expand_dims(first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)), 0)
        visible = keys <= gl.expand_dims(at, 1)
        if WINDOWED:
            visible = visible & (keys > gl.expand_dims(at - window, 1))
        scores = gl.where(visible, scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale)
    anchor = new_peak
    if WINDOWED:  # a row may see none of the keys so far, and inf − inf is not 0
        anchor = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(scores * scale - gl.expand_dims(anchor, 1))
    decay = gl.exp2(peak - anchor)
    return weights, decay, total * decay + gl.sum(weights, 1), new_peak


@gluon.jit
def _load_queries(q_ptr, q_smem, first_token, first_query, query_len, kv_head, q_stride, GROUPS: gl.constexpr,
                  HALVES: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    query = first_query + row // GROUPS
    real = (row // GROUPS < ROWS // GROUPS) & (query < query_len)
    heads = (kv_head * GROUPS + row % GROUPS) * (HALVES * 64)
    place = gl.expand_dims((first_token + query).to(gl.int64) * q_stride + heads, 1)
    dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, layout)), 0)
    for half in gl.static_range(HALVES):
        q = gl.load(q_ptr + place + (dims + half * 64), mask=gl.expand_dims(real, 1), other=0.0)
        q_smem.index(GROUP * HALVES + half).store(q)
    fence_async_shared()


@gluon.jit
def _store(acc, total, half, out_ptr, first_token, first_query, query_len, kv_head, out_stride, GROUPS: gl.constexpr,
           HALVES: gl.constexpr, ROWS: gl.constexpr, ACC: gl.constexpr):  # fmt: skip
    row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    query = first_query + row // GROUPS
    real = (row // GROUPS < ROWS // GROUPS) & (query < query_len)
    heads = (kv_head * GROUPS + row % GROUPS) * (HALVES * 64) + half * 64
    place = gl.expand_dims((first_token + query).to(gl.int64) * out_stride + heads, 1)
    dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, ACC)), 0)
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, ACC)), 1)
    gl.store(out_ptr + place + dims, acc.to(out_ptr.dtype.element_ty), mask=gl.expand_dims(real, 1))


@gluon.jit
def consume(q_ptr, out_ptr, q_smem, k_smem, v_smem, k_full, k_empty, v_full, v_empty, first_token, first_query,
             query_len, base, kv_head, start, stop, window, scale, q_stride, out_stride, GROUPS: gl.constexpr,
             HALVES: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             WINDOWED: gl.constexpr, GROUP: gl.constexpr):  # fmt: skip
    """A computing group of four warps."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    first_query += GROUP * (ROWS // GROUPS)
    _load_queries(q_ptr, q_smem, first_token, first_query, query_len, kv_head, q_stride, GROUPS, HALVES, ROWS, GROUP)
    at = base + gl.minimum(first_query + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES)) // GROUPS, query_len - 1)
    lowest = base + gl.minimum(first_query, query_len - 1)
    highest = base + gl.minimum(first_query + ROWS // GROUPS, query_len) - 1
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    left = gl.zeros([ROWS, 64], gl.float32, ACC)
    right = gl.zeros([ROWS, 64], gl.float32, ACC)

    mbarrier.wait(k_full.index(0), 0)
    scores = _multiply_keys(q_smem, k_smem, 0, ROWS, BLOCK_N, HALVES, GROUP, SCORES)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0))
    weights, decay, total, peak = _weigh(
        scores, total, peak, at, start, lowest, highest, window, scale, BLOCK_N, WINDOWED, SCORES
    )
    operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    for first in range(start + BLOCK_N, stop, BLOCK_N):
        step = (first - start) // BLOCK_N
        stage = step % STAGES
        before = (step - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        scores = _multiply_keys(q_smem, k_smem, stage, ROWS, BLOCK_N, HALVES, GROUP, SCORES)
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        left, right = _multiply_values(operand, v_smem, before, left, right, HALVES)
        scores = warpgroup_mma_wait(HALVES, deps=(scores,))  # the values' products go on
        mbarrier.arrive(k_empty.index(stage))
        weights, decay, total, peak = _weigh(
            scores, total, peak, at, first, lowest, highest, window, scale, BLOCK_N, WINDOWED, SCORES
        )
        left, right = _finish_values(operand, left, right, HALVES)
        mbarrier.arrive(v_empty.index(before))
        shrink = gl.expand_dims(gl.convert_layout(decay, gl.SliceLayout(1, ACC)), 1)
        left = left * shrink
        right = right * shrink
        operand = gl.convert_layout(weights.to(dtype), WEIGHTS)
    step = (stop - start - 1) // BLOCK_N
    last = step % STAGES
    mbarrier.wait(v_full.index(last), (step // STAGES) & 1)
    left, right = _multiply_values(operand, v_smem, last, left, right, HALVES)
    left, right = _finish_values(operand, left, right, HALVES)
    _store(left, total, 0, out_ptr, first_token, first_query, query_len, kv_head, out_stride, GROUPS, HALVES, ROWS, ACC)
    if HALVES == 2:
        _store(
            right,
            total,
            1,
            out_ptr,
            first_token,
            first_query,
            query_len,
            kv_head,
            out_stride,
            GROUPS,
            HALVES,
            ROWS,
            ACC,
        )
