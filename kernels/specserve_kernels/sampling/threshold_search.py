"""The search of threshold.py: one row's threshold by bisection over the ordered images of its candidates' values."""

from __future__ import annotations

from specserve_kernels.language import tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.cut import divide
from specserve_kernels.sampling.ordered import from_ordered, to_ordered
from specserve_kernels.sampling.threshold_parts import bracket, count_of, mass_of, needed_mass, weight_of

_LOWEST = tl.constexpr(-(2**31))


@triton.jit
def kth_largest(images, low, high, k):
    """The largest integer of [low, high] (int64) that at least k of the int32 images are not below."""
    while low < high:
        middle = high - (high - low) // 2
        if tl.sum((images >= middle.to(tl.int32)).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _values(values, raw, divide_by, is_row, index, size):
    """Of the list or, where that was too short, of the row itself; NaN past the end, which equals nothing."""
    listed = tl.load(values + index, mask=(index < size) & (is_row == 0), other=float("nan"))
    own = tl.load(raw + index, mask=(index < size) & is_row, other=float("nan")).to(tl.float32)
    return tl.where(is_row, divide(own, divide_by), listed)


@triton.jit
def _block(values, raw, divide_by, is_row, start, size, largest, scale, BLOCK: tl.constexpr):
    """Images and weights of BLOCK values; past the end weights are 0."""
    index = start + tl.arange(0, BLOCK)
    x = _values(values, raw, divide_by, is_row, index, size)
    exists = index < size
    x = tl.where(exists, x, float("-inf"))
    return tl.where(exists, to_ordered(x), _LOWEST), tl.where(exists, weight_of(x, largest, scale), 0)


@triton.jit
def _weight_from(
    image, images, weights, values, raw, divide_by, is_row, size, largest, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """The weight of all values whose image is not below `image`; the first block of them is in registers."""
    image = image.to(tl.int32)
    total = tl.sum(tl.where(images >= image, weights, 0), axis=0)
    start = tl.full((), BLOCK, tl.int32)
    while start < size:
        more_images, more_weights = _block(values, raw, divide_by, is_row, start, size, largest, scale, BLOCK)
        total += tl.sum(tl.where(more_images >= image, more_weights, 0), axis=0)
        start += BLOCK
    return total


@triton.jit
def _ties_to(last, value, values, raw, divide_by, is_row, ids, size, BLOCK: tl.constexpr):
    """How many tokens of id ≤ last have this value."""
    total = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    while start < size:
        index = start + tl.arange(0, BLOCK)
        x = _values(values, raw, divide_by, is_row, index, size)
        token = tl.where(is_row, index, tl.load(ids + index, mask=(index < size) & (is_row == 0), other=0))
        total += tl.sum(((x == value) & (token <= last)).to(tl.int32), axis=0)
        start += BLOCK
    return total


@triton.jit
def _highest(
    low, high, needed, above, images, weights, values, raw, divide_by, is_row, size, largest, scale,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(image, over): the highest image in [low, high] from which on the tokens' count or mass reaches `needed`, and the
    weight of the tokens over it; low itself where none does.
    """
    while low < high:
        middle = high - (high - low) // 2
        weight = above + _weight_from(
            middle, images, weights, values, raw, divide_by, is_row, size, largest, scale, BLOCK
        )
        reaches = mass_of(weight) >= needed if BY_MASS else count_of(weight) >= needed
        if reaches:
            low = middle
        else:
            high = middle - 1
    return low, above + _weight_from(
        low + 1, images, weights, values, raw, divide_by, is_row, size, largest, scale, BLOCK
    )


@triton.jit
def _last_id(room, value, values, raw, divide_by, is_row, ids, size, vocab, BLOCK: tl.constexpr):
    """(id, count): the id of the room-th token of this value, or vocab if all have room, and how many have."""
    low = tl.full((), 0, tl.int32)
    high = low + vocab
    ties = _ties_to(high, value, values, raw, divide_by, is_row, ids, size, BLOCK).to(tl.int64)
    if ties <= room:
        low = high
    while low < high:
        middle = (low + high) // 2
        if _ties_to(middle, value, values, raw, divide_by, is_row, ids, size, BLOCK) >= room:
            high = middle
        else:
            low = middle + 1
    return low, tl.minimum(ties, room)


@relaunched
@triton.jit(do_not_specialize=["num_steps", "num_rows"], do_not_specialize_on_alignment=["top_k", "top_p", "divisor"])
def search(
    thresholds, last_ids, totals, logits, divisor, values, ids, counts, bounds, pivot_sums, top_k, top_p,
    vocab, distance, num_steps, num_rows,
    ROUNDS: tl.constexpr, DIVIDED: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Program (row): the numbers of `cut.Cut`; totals hold the whole row's before, and keep it where all stays."""
    row = tl.program_id(0).to(tl.int64)
    k, p = tl.load(top_k + row // num_steps), tl.load(top_p + row // num_steps).to(tl.float32)
    has_k, has_p = k < vocab, p < float("inf")
    if not (has_k | has_p):
        tl.store(thresholds + row, float("-inf"))
        tl.store(last_ids + row, vocab)
        return
    needed = needed_mass(p)
    largest, scale = tl.load(bounds + row * 4), tl.load(bounds + row * 4 + 1)
    low, high, above = tl.load(bounds + row * 4 + 2), largest, tl.full((), 0, tl.int64)
    if not has_k:
        low, high, above = bracket(bounds, pivot_sums, needed, row, num_rows, ROUNDS)
    size = tl.load(counts + row)
    is_row = size > CAPACITY  # too many for the list: search the row itself
    values += row * CAPACITY
    ids += row * CAPACITY
    raw = logits + row * distance
    divide_by = tl.full((), 1.0, tl.float32)
    if DIVIDED:
        divide_by = tl.load(divisor + row // num_steps).to(tl.float32)
    if is_row:
        size = vocab
        above = tl.full((), 0, tl.int64)
    images, weights = _block(values, raw, divide_by, is_row, 0, size, largest, scale, CAPACITY)

    image, top = to_ordered(low).to(tl.int64), to_ordered(high).to(tl.int64)
    lowest = image
    over = tl.full((), 0, tl.int64)
    room = tl.full((), 0, tl.int64) + vocab  # for tokens equal to the threshold
    if has_k:
        image, over = _highest(
            image,
            top,
            k,
            above,
            images,
            weights,
            values,
            raw,
            divide_by,
            is_row,
            size,
            largest,
            scale,
            BY_MASS=False,
            BLOCK=CAPACITY,
        )
        room = k - count_of(over)
        lowest = image
        one = mass_of(weight_of(from_ordered(image.to(tl.int32)), largest, scale))
        needed = tl.minimum(p, 2.0).to(tl.float64) * (mass_of(over) + room.to(tl.float64) * one)
    if has_p:
        image, over = _highest(
            image,
            top,
            needed,
            above,
            images,
            weights,
            values,
            raw,
            divide_by,
            is_row,
            size,
            largest,
            scale,
            BY_MASS=True,
            BLOCK=CAPACITY,
        )
        one = mass_of(weight_of(from_ordered(image.to(tl.int32)), largest, scale))
        # the fewest of the equal ones that reach it; all of them where their mass is too small to be seen
        wanted = tl.ceil((needed - mass_of(over)) / tl.maximum(one, 1.0)).to(tl.int64)
        wanted = tl.where(one > 0, tl.maximum(wanted, 1), vocab)
        room = tl.where(image == lowest, tl.minimum(room, wanted), wanted)
    value = from_ordered(image.to(tl.int32))
    last, kept = _last_id(room, value, values, raw, divide_by, is_row, ids, size, vocab, CAPACITY)
    mass = mass_of(over) + kept.to(tl.float64) * mass_of(weight_of(value, largest, scale))
    tl.store(thresholds + row, value)
    tl.store(last_ids + row, last)
    tl.store(totals + row, (mass / scale).to(tl.float32))
