"""Adding up the parts of a sequence's attention that several programs computed.

    out = sum over parts of 2^lse partial / sum over parts of 2^lse

partial: [items, kv_heads, rows, head_dim] fp32, each part's own attention, normed by its own sum of weights
lse:     [items, kv_heads, rows] fp32, log2 of that sum of 2^(score · log2 e); -inf where the row sees none of its keys
"""

from __future__ import annotations

from specserve_kernels.language import tl, triton

COMBINED = 4096
"""Numbers of the workspace that a program adds up at a time."""


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
    TILE_PARTS: tl.constexpr,
):
    """out[row] = sum over parts of 2^lse partial[row] / sum of 2^lse, TILE_PARTS parts at a time."""
    row = first_row + tl.arange(0, TILE_ROWS)
    dims = tl.arange(0, DIM)
    real = row < num_rows
    peak = tl.full([TILE_ROWS], -1e30, dtype=tl.float32)
    total = tl.zeros([TILE_ROWS], dtype=tl.float32)
    acc = tl.zeros([TILE_ROWS, DIM], dtype=tl.float32)
    for start in range(0, parts, TILE_PARTS):
        part = start + tl.arange(0, TILE_PARTS)
        at = ((first_item + part) * KV_HEADS + kv_head).to(tl.int64)[:, None] * rows + row[None, :]
        read = (part < parts)[:, None] & real[None, :]
        # Other programs wrote these: past the first-level cache, which may hold what was there before.
        sums = tl.load(lse + at, mask=read, other=float("-inf"), cache_modifier=".cg")
        cells = at[:, :, None] * HEAD_DIM + dims[None, None, :]
        there = read[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        values = tl.load(partial + cells, mask=there, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(sums, 0))
        weights = tl.exp2(sums - new_peak[None, :])
        decay = tl.exp2(peak - new_peak)
        total = total * decay + tl.sum(weights, 0)
        acc = acc * decay[:, None] + tl.sum(weights[:, :, None] * values, 0)
        peak = new_peak
    result = acc / tl.maximum(total, 1.0)[:, None]  # the peak's own weight is 1
    places = (row // GROUPS).to(tl.int64) * out_stride + (kv_head * GROUPS + row % GROUPS) * HEAD_DIM
    inside = real[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(out + places[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
