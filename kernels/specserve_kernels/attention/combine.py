"""Adding up the parts of a sequence's attention that several programs computed.

    out = sum over parts of 2^lse partial / sum over parts of 2^lse

partial: [items, kv_heads, rows, head_dim] fp32, each part's own attention, normed by its own sum of weights
lse:     [items, kv_heads, rows] fp32, log2 of that sum of 2^(score · log2 e); -inf where the row sees none of its keys
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

COMBINED = 1024
"""Results that a program adds up at a time."""
AHEAD = 8
"""Parts asked for before the first is added."""


@triton.jit
def combine(
    partial,
    lse,
    out,  # of the sequence's first token
    parts,
    first_item,
    num_rows,
    kv_head,
    first_row,
    rows,
    out_stride,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Rows first_row … first_row + TILE_ROWS - 1 of `out`. A thread adds its numbers of all parts, one by one in their
    order, so that threads need not meet; the loads of AHEAD parts depend on nothing and travel together."""
    row = first_row + tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, DIM)
    real = row < num_rows
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    peak = tl.full([TILE_ROWS], -1e30, dtype=tl.float32)
    total = tl.zeros([TILE_ROWS], dtype=tl.float32)
    acc = tl.zeros([TILE_ROWS, DIM], dtype=tl.float32)
    cell = (first_item * KV_HEADS + kv_head).to(tl.int64) * rows + row
    for start in range(0, parts, AHEAD):
        for j in tl.static_range(AHEAD):
            at = cell + (start + j) * KV_HEADS * rows
            there = start + j < parts
            # Other programs wrote these: past the first-level cache, which may hold what was there before.
            part = tl.load(lse + at, mask=real & there, other=float("-inf"), cache_modifier=".cg")
            cells = partial + at[:, None] * HEAD_DIM + dims[None, :]
            values = tl.load(cells, mask=inside & there, other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, part)
            weight = tl.exp2(part - new_peak)
            decay = tl.exp2(peak - new_peak)
            total = total * decay + weight
            acc = acc * decay[:, None] + weight[:, None] * values
            peak = new_peak
    result = acc * (1.0 / tl.maximum(total, 1.0))[:, None]  # the peak's own weight is 1
    places = (row // GROUPS).to(tl.int64) * out_stride + (kv_head * GROUPS + row % GROUPS) * HEAD_DIM
    tl.store(out + places[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
