"""top_k and top_p on the GPU without a sort: the threshold of each row is searched for, then all below it is masked.

    survey   (row, tile)  softmax statistics, and the maximum of every group of 64 tokens
    plan     (row)        from them m, s, and a bound below which no kept token can lie:
                          with top_k, the k-th largest group maximum (k tokens are not below it);
                          with top_p alone, log((1 − p) / vocab): all tokens below it together have no mass of 1 − p
    narrow   (row, tile)  top_p alone, twice: the mass above 16 pivots in the bracket, of which a sixteenth stays
    collect  (row, tile)  the candidates in the bracket, few of the vocabulary, into a list
    search   (row)        bisection over the ordered integer images of the candidates' values, which is exact
    mask     (row, tile)  logits below the threshold, and equal ones past the last id that has room, become −inf

The mask is for those who want the logits themselves. Who goes on sampling takes the numbers of `cut.py`, and the
vocabulary is only read: logits as the model gave them, divided on the way.

Masses are integers: the probability times 2^42, truncated, with the number of tokens in the bits above
(threshold_parts.py). Sums of integers are exact and the same in any order, so that a row's tokens do not depend on the
order in which atomic additions happen to be made. Within a tile of `narrow` they are float32, in a fixed order: that
rounding may at most move a bracket past a token whose mass is the difference.

Rows with top_k, with top_p or with both are told apart by what they hold, not by kernels of their own. The host knows
whether there are any, and leaves out `narrow` and the groups' maxima; nothing is compiled for the difference.

Where a row has more candidates than the list holds, the search reads the row itself: slow, but right.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.cut import Cut, load_logits, stays
from specserve_kernels.sampling.dense import evenly_spaced
from specserve_kernels.sampling.ordered import from_ordered, to_ordered
from specserve_kernels.sampling.softmax_parts import STATISTICS_TILE, row_statistics, tile_statistics
from specserve_kernels.sampling.threshold_parts import NUM_PIVOTS, ONE, bracket, needed_mass, pivot
from specserve_kernels.sampling.threshold_search import kth_largest, search

GROUP = 64
CAPACITY = 4096  # candidates a row
ROUNDS = 2
MAX_VOCAB = 2**19  # 19 bits count tokens, 44 hold their mass
_SETTINGS = ["top_k", "top_p", "divisor"]
_NUM_PIVOTS = tl.constexpr(NUM_PIVOTS)
_ONE = tl.constexpr(float(ONE))
_DEPTH = tl.constexpr(40.0)  # below the maximum: e^−40 · 2^42 is no mass


@triton.jit
def _load_row(logits, divisor, row, token, vocab, distance, num_steps, DIVIDED: tl.constexpr):
    return load_logits(logits, row * distance + token, token < vocab, divisor, row // num_steps, DIVIDED)


@relaunched
@triton.jit(do_not_specialize=["num_steps", "num_groups"], do_not_specialize_on_alignment=["divisor"])
def _survey(
    maxima, sums, group_maxima, logits, divisor, vocab, distance, num_steps, num_groups,
    DIVIDED: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = _load_row(logits, divisor, row, token, vocab, distance, num_steps, DIVIDED)
    largest, total = tile_statistics(x)
    tl.store(maxima + row * tl.num_programs(1) + tile, largest)
    tl.store(sums + row * tl.num_programs(1) + tile, total)
    if num_groups > 0:
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        groups = tl.max(tl.reshape(x, (TILE // GROUP, GROUP)), axis=1)
        tl.store(group_maxima + row * num_groups + group, groups, mask=group < num_groups)


@relaunched
@triton.jit(
    do_not_specialize=["num_steps", "num_rows", "num_tiles", "num_groups"], do_not_specialize_on_alignment=_SETTINGS
)
def _plan(
    bounds, largests, totals, counts, pivot_sums, maxima, sums, group_maxima, top_k, top_p,
    vocab, num_steps, num_rows, num_tiles, num_groups,
    ROUNDS: tl.constexpr, TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    parts_m = tl.load(maxima + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    parts_s = tl.load(sums + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    largest, total = row_statistics(parts_m, parts_s, 0)
    k, p = tl.load(top_k + row // num_steps), tl.load(top_p + row // num_steps).to(tl.float32)
    if k < vocab:
        low = float("-inf")
        if k <= num_groups:
            group = tl.arange(0, GROUPS)
            x = tl.load(group_maxima + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
            images = to_ordered(x)
            start = tl.min(images, axis=0).to(tl.int64)
            low = from_ordered(kth_largest(images, start, tl.max(images, axis=0).to(tl.int64), k).to(tl.int32))
    else:
        # the hundredth is for rounding; a p of 1 would need everything that has a mass
        bound = tl.log(total) + tl.log(tl.maximum(1.0 - p, 1e-20) / vocab) - 0.01
        low = largest + tl.maximum(bound, -_DEPTH)
    tl.store(largests + row, largest)
    tl.store(totals + row, total)
    tl.store(bounds + row * 4, largest)
    tl.store(bounds + row * 4 + 1, _ONE / total)
    tl.store(bounds + row * 4 + 2, low)
    tl.store(bounds + row * 4 + 3, largest)
    tl.store(counts + row, 0)
    index = tl.arange(0, _NUM_PIVOTS)
    for i in tl.static_range(ROUNDS):
        tl.store(pivot_sums + (i * num_rows + row) * _NUM_PIVOTS + index, tl.zeros_like(index).to(tl.int64))


@relaunched
@triton.jit(do_not_specialize=["num_steps", "num_rows"], do_not_specialize_on_alignment=_SETTINGS)
def _narrow(
    pivot_sums, bounds, maxima, logits, divisor, top_k, top_p, vocab, distance, num_steps, num_rows,
    ROUND: tl.constexpr, DIVIDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = tl.load(top_p + row // num_steps).to(tl.float32)
    if (tl.load(top_k + row // num_steps) < vocab) | (p == float("inf")):
        return
    low, high, _ = bracket(bounds, pivot_sums, needed_mass(p), row, num_rows, ROUND)
    if tl.load(maxima + row * tl.num_programs(1) + tile) < low:
        return
    largest, scale = tl.load(bounds + row * 4), tl.load(bounds + row * 4 + 1)
    index = tl.arange(0, _NUM_PIVOTS)
    pivots = pivot(low, high, index)
    totals = tl.zeros((_NUM_PIVOTS, BLOCK), dtype=tl.float32)
    for i in tl.static_range(TILE // BLOCK):
        token = tile * TILE + i * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = _load_row(logits, divisor, row, token, vocab, distance, num_steps, DIVIDED)
        mass = tl.exp(x - largest) * scale
        totals += tl.where(x >= pivots[:, None], mass, 0.0)
    place = (ROUND * num_rows + row) * _NUM_PIVOTS + index
    tl.atomic_add(pivot_sums + place, tl.sum(totals, axis=1).to(tl.int64), sem="relaxed")


@relaunched
@triton.jit(do_not_specialize=["num_steps", "num_rows"], do_not_specialize_on_alignment=_SETTINGS)
def _collect(
    values, ids, counts, pivot_sums, bounds, maxima, logits, divisor, top_k, top_p,
    vocab, distance, num_steps, num_rows,
    ROUNDS: tl.constexpr, DIVIDED: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    has_k = tl.load(top_k + row // num_steps) < vocab
    p = tl.load(top_p + row // num_steps).to(tl.float32)
    if (not has_k) & (p == float("inf")):
        return
    low, high, above = tl.load(bounds + row * 4 + 2), tl.load(bounds + row * 4 + 3), tl.full((), 0, tl.int64)
    if not has_k:
        low, high, above = bracket(bounds, pivot_sums, needed_mass(p), row, num_rows, ROUNDS)
    if tl.load(maxima + row * tl.num_programs(1) + tile) < low:
        return
    token = tile * TILE + tl.arange(0, TILE)
    x = _load_row(logits, divisor, row, token, vocab, distance, num_steps, DIVIDED)
    take = (token < vocab) & (x >= low) & (x < tl.where(above == 0, float("inf"), high))
    taken = take.to(tl.int32)
    if tl.sum(taken, axis=0) == 0:
        return
    place = tl.atomic_add(counts + row, tl.sum(taken, axis=0), sem="relaxed") + tl.cumsum(taken, axis=0) - 1
    tl.store(values + row * CAPACITY + place, x, mask=take & (place < CAPACITY))
    tl.store(ids + row * CAPACITY + place, token, mask=take & (place < CAPACITY))


@relaunched
@triton.jit(do_not_specialize=["num_steps"])
def _mask(masked, thresholds, last_ids, logits, vocab, distance, num_steps, TILE: tl.constexpr):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = _load_row(logits, None, row, token, vocab, distance, num_steps, False)
    keep = stays(x, token, tl.load(thresholds + row), tl.load(last_ids + row))
    tl.store(masked + row * vocab + token, tl.where(keep, x, float("-inf")), mask=token < vocab)


def find_cut(
    logits: Tensor,
    divisor: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
    max_top_k: int,
    any_top_p: bool,
    any_top_p_alone: bool,
) -> Cut:
    """logits [B, Q, vocab] of any float dtype, dense in the vocabulary; divisor [B] or None; the rest as in
    `selection.truncate`."""
    batch, num_steps, vocab = logits.shape
    assert vocab < MAX_VOCAB, vocab
    num_rows, num_tiles, most_groups = batch * num_steps, cdiv(vocab, STATISTICS_TILE), cdiv(vocab, GROUP)
    num_groups, divided = most_groups if max_top_k > 0 else 0, divisor is not None
    top_k, top_p, divisor = top_k.contiguous(), top_p.contiguous(), None if divisor is None else divisor.contiguous()
    floats = partial(torch.empty, dtype=torch.float32, device=logits.device)
    ints = partial(torch.empty, dtype=torch.int32, device=logits.device)
    cut = Cut(*(make(batch, num_steps) for make in (floats, ints, floats, floats)))
    if num_rows == 0:
        return cut
    maxima, sums, groups, values, bounds = (
        floats(num_rows, size) for size in (num_tiles, num_tiles, max(num_groups, 1), CAPACITY, 4)
    )
    ids, counts = ints(num_rows, CAPACITY), ints(num_rows)
    pivot_sums = torch.empty((ROUNDS, num_rows, NUM_PIVOTS), dtype=torch.int64, device=logits.device)
    logits, distance = evenly_spaced(logits)
    tiles, row = (num_rows, num_tiles), (vocab, distance, num_steps)
    tile = {"DIVIDED": divided, "TILE": STATISTICS_TILE, "num_warps": 4}
    _survey[tiles](maxima, sums, groups, logits, divisor, *row, num_groups, GROUP=GROUP, **tile)
    _plan[(num_rows,)](
        bounds, cut.largest, cut.total, counts, pivot_sums, maxima, sums, groups, top_k, top_p, vocab, num_steps,
        num_rows, num_tiles, num_groups, ROUNDS=ROUNDS, TILES=power_of_2(num_tiles), GROUPS=power_of_2(most_groups),
        num_warps=4,
    )  # fmt: skip
    for one in range(ROUNDS if any_top_p_alone else 0):
        _narrow[tiles](
            pivot_sums, bounds, maxima, logits, divisor, top_k, top_p, *row, num_rows, ROUND=one, BLOCK=256, **tile
        )
    _collect[tiles](
        values, ids, counts, pivot_sums, bounds, maxima, logits, divisor, top_k, top_p, *row, num_rows,
        ROUNDS=ROUNDS, CAPACITY=CAPACITY, **tile,
    )  # fmt: skip
    search[(num_rows,)](
        *cut[:2], cut.total, logits, divisor, values, ids, counts, bounds, pivot_sums, top_k, top_p, *row, num_rows,
        ROUNDS=ROUNDS, DIVIDED=divided, CAPACITY=CAPACITY, num_warps=8,
    )  # fmt: skip
    return cut


def top_k_top_p_triton(
    logits: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int, any_top_p: bool, any_top_p_alone: bool
) -> Tensor:
    """As `selection.top_k_top_p`: logits [B, Q, vocab] float32, dense in the vocabulary."""
    assert logits.dtype == torch.float32, logits.dtype
    cut = find_cut(logits, None, top_k, top_p, max_top_k, any_top_p, any_top_p_alone)
    batch, num_steps, vocab = logits.shape
    masked = logits.new_empty((batch, num_steps, vocab))
    logits, distance = evenly_spaced(logits)
    if masked.numel():
        _mask[(batch * num_steps, cdiv(vocab, STATISTICS_TILE))](
            masked, cut.threshold, cut.last_id, logits, vocab, distance, num_steps,
            TILE=STATISTICS_TILE, num_warps=4,
        )  # fmt: skip
    return masked
