"""What a program of `attention_decode` does with its part of a sequence's keys: finding, fetching and attending."""

from __future__ import annotations

from specserve_kernels.language import tl, triton


@triton.jit
def load_item(record):
    """An item of the plan, see `plan`. All of the record at once: loads that wait for one another cost most of a short
    part's time, and the compiler would move plain ones behind the branch that asks for the end."""
    first_token = tl.load(record, volatile=True).to(tl.int64)
    num_queries = tl.load(record + 1, volatile=True)
    table_row = tl.load(record + 2, volatile=True)
    begin = tl.load(record + 3, volatile=True)
    end = tl.load(record + 4, volatile=True)
    parts = tl.load(record + 5, volatile=True)
    first_item = tl.load(record + 6, volatile=True)
    return first_token, num_queries, table_row, begin, end, parts, first_item


@triton.jit
def locate(table, first, end, slot_stride, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Where in the caches the KEYS keys from `first` on begin; keys from `end` on repeat the last one."""
    key = tl.minimum(first + tl.arange(0, KEYS), end - 1).to(tl.uint32)  # unsigned: divisions are shifts
    block = tl.load(table + key // BLOCK_SIZE).to(tl.uint32)
    return (block * BLOCK_SIZE + key % BLOCK_SIZE).to(tl.int64) * slot_stride


@triton.jit
def prefetch(k_cache, v_cache, rows, HEAD_DIM: tl.constexpr):
    """Ask for these rows of the caches, so that they are in the second-level cache when needed."""
    LINE: tl.constexpr = 128 // (k_cache.dtype.element_ty.primitive_bitwidth // 8)
    for line in tl.static_range(0, HEAD_DIM, LINE):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; prefetch.global.L2 [$2]; mov.b32 $0, 0;", "=r,l,l",
            [k_cache + rows + line, v_cache + rows + line], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _load(cache, rows, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    dims = tl.arange(0, DIM)
    cells = cache + rows[:, None] + dims[None, :]
    return tl.load(cells) if HEAD_DIM == DIM else tl.load(cells, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def attend(
    q,
    k_cache,
    v_cache,
    table,
    rows,
    at,
    begin,
    end,
    window,
    scale,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Attention of rows q [BLOCK_M, DIM] at positions `at` over keys begin … end - 1, the first of which are in `rows`:
    (sum of weighted values, sum of weights, largest score); the weights are 2^(score - largest score)."""
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    acc = tl.zeros([BLOCK_M, DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # added up at the end: warps need not meet for it before
    peak = tl.full([BLOCK_M], -1e30, dtype=tl.float32)  # finite: a row may see no key of this part
    for first in range(begin, end, BLOCK_N):
        k = _load(k_cache, rows, HEAD_DIM, DIM)
        v = _load(v_cache, rows, HEAD_DIM, DIM)
        # A tile ahead, in registers: the compiler's pipeline would pass the block table through shared memory.
        rows = locate(table, first + BLOCK_N, end, slot_stride, BLOCK_SIZE, BLOCK_N)
        keys = first + tl.arange(0, BLOCK_N)
        scores = tl.dot(q, k.T, input_precision=precision) * scale
        visible = (keys[None, :] <= at[:, None]) & (keys[None, :] < end)
        if WINDOWED:
            visible &= keys[None, :] > at[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - new_peak[:, None])
        decay = tl.exp2(peak - new_peak)
        total = total * decay[:, None] + weights
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=precision)
        peak = new_peak
    return acc, tl.sum(total, 1), peak
