"""`rejection.verify` on the GPU: the vocabulary is streamed once, and once more for one position of a rejection row.

    survey    (row · position, tile)  best word, or softmax statistics of p in a rejection row
    settle    (row)                   tokens, acceptance, counts; p's statistics at a rejection row's last position
    redraw    (row, tile)             rejection rows: best word of the residual, or of the target after the last draft
    finish    (row)                   rejection rows: the redrawn token into its place

The last two run only where some row is a rejection row. Nothing of the size of the vocabulary is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.sampling.best_token import tile_size, warps_of
from specserve_kernels.sampling.noise import gumbel, noise_key, uniform
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.softmax_parts import STATISTICS_TILE, probability, row_statistics, tile_statistics

MIN_STEPS = 16  # positions in one register tile: up to 15 drafts compile once
_ACCEPT = tl.constexpr(int(Stream.ACCEPT))
_RESIDUAL = tl.constexpr(int(Stream.RESIDUAL))
_SAMPLE = tl.constexpr(int(Stream.SAMPLE))
_FLAGS = ["temperature", "is_coupled"]
_ROWS = ["seed", "first_position", *_FLAGS, "divisor"]  # one number a row: its alignment is nothing to compile for
_TINY = tl.constexpr(float(torch.finfo(torch.float32).tiny))


@triton.jit
def _is_rejection(is_coupled, temperature, row):
    return (tl.load(is_coupled + row) == 0) & (tl.load(temperature + row) > 0)


@triton.jit
def _load_logits(logits, at, keep, divisor, row, DIVIDED: tl.constexpr):
    x = tl.load(logits + at, mask=keep, other=float("-inf")).to(tl.float32)
    if DIVIDED:
        x = tl.div_rn(x, tl.load(divisor + row).to(tl.float32))
    return x


@triton.jit(do_not_specialize=["num_positions"], do_not_specialize_on_alignment=_ROWS)
def _survey(
    words, maxima, sums, logits, seed, first_position, temperature, is_coupled, divisor,
    vocab, num_positions, stride_row, stride_position,
    SAMPLED: tl.constexpr, REJECTION: tl.constexpr, DIVIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_positions).to(tl.int64)
    step, tile = tl.program_id(0) % num_positions, tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tile
    token = tile * TILE + tl.arange(0, TILE)
    at = row * stride_row + step * stride_position + token
    x = _load_logits(logits, at, token < vocab, divisor, row, DIVIDED)
    if REJECTION and _is_rejection(is_coupled, temperature, row):
        largest, total = tile_statistics(x)
        tl.store(maxima + place, largest)
        tl.store(sums + place, total)
        return
    if SAMPLED and tl.load(temperature + row) > 0 and tl.max(x, axis=0) > float("-inf"):
        x += gumbel(noise_key(tl.load(seed + row), tl.load(first_position + row) + step, _SAMPLE), token)
    tl.store(words + place, best_word(x, token))


@triton.jit(
    do_not_specialize=["num_drafts", "num_tiles"],
    do_not_specialize_on_alignment=[*_ROWS, "logits", "drafts", "draft_counts", "draft_probs"],
)
def _settle(
    tokens, num_tokens, num_accepted, statistics,
    words, maxima, sums, logits, drafts, draft_counts, draft_probs,
    seed, first_position, temperature, is_coupled, divisor,
    vocab, num_drafts, num_tiles, stride_row, stride_position,
    REJECTION: tl.constexpr, ONE_HOT: tl.constexpr, DIVIDED: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """tokens [B, K+1], num_tokens, num_accepted [B] int64; statistics [B, 2] float32: m, s of the last position."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, STEPS)
    tile = tl.arange(0, TILES)
    place = (row * (num_drafts + 1) + step[:, None]) * num_tiles + tile[None, :]
    exists = (step[:, None] <= num_drafts) & (tile[None, :] < num_tiles)
    count = tl.load(draft_counts + row).to(tl.int32)
    valid = (step < num_drafts) & (step < count)
    draft = tl.load(drafts + row * num_drafts + step, mask=valid, other=0)
    rejects = False
    if REJECTION:
        rejects = _is_rejection(is_coupled, temperature, row)
    if rejects:
        parts_m = tl.load(maxima + place, mask=exists, other=float("-inf"))
        parts_s = tl.load(sums + place, mask=exists, other=0.0)
        largest, total = row_statistics(parts_m, parts_s, 1)
        at = row * stride_row + step * stride_position + draft
        p = probability(_load_logits(logits, at, valid, divisor, row, DIVIDED), largest, total)
        threshold = uniform(noise_key(tl.load(seed + row), tl.load(first_position + row) + step, _ACCEPT))
        if not ONE_HOT:
            q = tl.load(draft_probs + (row * num_drafts + step) * vocab + draft, mask=valid, other=0.0)
            threshold = threshold * q.to(tl.float64)
        refused = tl.where(valid & (threshold >= p.to(tl.float64)), step, num_drafts)
        accepted = tl.minimum(tl.min(refused, axis=0), count)
        tl.store(statistics + row * 2, tl.sum(tl.where(step == accepted, largest, 0.0), axis=0))
        tl.store(statistics + row * 2 + 1, tl.sum(tl.where(step == accepted, total, 0.0), axis=0))
        tl.store(tokens + row * (num_drafts + 1) + step, draft, mask=step <= num_drafts)
    else:
        own = word_token(tl.max(tl.load(words + place, mask=exists, other=NO_WORD), axis=1), vocab)
        refused = tl.where(valid & (draft != own), step, num_drafts)
        accepted = tl.minimum(tl.min(refused, axis=0), count)
        tl.store(tokens + row * (num_drafts + 1) + step, own, mask=step <= num_drafts)
    tl.store(num_accepted + row, accepted.to(tl.int64))
    tl.store(num_tokens + row, (accepted + 1).to(tl.int64))


@triton.jit(do_not_specialize=["num_drafts"], do_not_specialize_on_alignment=[*_ROWS, "drafts", "draft_counts"])
def _redraw(
    words, spare_words, num_accepted, statistics, logits, draft_counts, drafts, draft_probs,
    seed, first_position, temperature, is_coupled, divisor,
    vocab, num_drafts, stride_row, stride_position,
    ONE_HOT: tl.constexpr, DIVIDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Best word of the residual (p − q)₊, or, in a tile where it is nothing, the spare one of p itself: if it is
    nothing in all tiles, the rejection was rounding error and p is the answer.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not _is_rejection(is_coupled, temperature, row):
        return
    accepted = tl.load(num_accepted + row)
    rejected = accepted < tl.load(draft_counts + row)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    x = _load_logits(logits, row * stride_row + accepted * stride_position + token, inside, divisor, row, DIVIDED)
    place = row * tl.num_programs(1) + tile
    if tl.max(x, axis=0) == float("-inf"):  # most tiles after top_k
        tl.store(words + place, NO_WORD)
        tl.store(spare_words + place, NO_WORD)
        return
    stream = tl.where(rejected, _RESIDUAL, _SAMPLE)
    noise = gumbel(noise_key(tl.load(seed + row), tl.load(first_position + row) + accepted, stream), token)
    if rejected:
        p = probability(x, tl.load(statistics + row * 2), tl.load(statistics + row * 2 + 1))
        draft = row * num_drafts + accepted
        if ONE_HOT:
            q = tl.where(token == tl.load(drafts + draft), 1.0, 0.0)
        else:
            q = tl.load(draft_probs + draft * vocab + token, mask=inside, other=0.0).to(tl.float32)
        residual = p - q
        has_residual = tl.max(residual, axis=0) > 0
        mass = tl.where(has_residual, residual, p)
        word = best_word(tl.where(mass > 0, tl.log(tl.maximum(mass, _TINY)) + noise, float("-inf")), token)
        tl.store(words + place, tl.where(has_residual, word, NO_WORD))
        tl.store(spare_words + place, tl.where(has_residual, NO_WORD, word))
    else:
        tl.store(words + place, best_word(x + noise, token))
        tl.store(spare_words + place, NO_WORD)


@triton.jit(do_not_specialize=["num_drafts", "num_tiles"], do_not_specialize_on_alignment=_FLAGS)
def _finish(
    tokens, words, spare_words, num_accepted, temperature, is_coupled, vocab, num_drafts, num_tiles, TILES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if not _is_rejection(is_coupled, temperature, row):
        return
    tile = tl.arange(0, TILES)
    best = tl.max(tl.load(words + row * num_tiles + tile, mask=tile < num_tiles, other=NO_WORD), axis=0)
    spare = tl.max(tl.load(spare_words + row * num_tiles + tile, mask=tile < num_tiles, other=NO_WORD), axis=0)
    token = word_token(tl.where(best == NO_WORD, spare, best), vocab)
    tl.store(tokens + row * (num_drafts + 1) + tl.load(num_accepted + row), token)


def verify_triton(
    processed: Tensor,
    drafts: Tensor,
    draft_counts: Tensor,
    draft_probs: Tensor | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    divisor: Tensor | None,
    any_coupled: bool,
    any_rejection: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors as in `rejection.verify`, dense but for processed's first two dimensions; the fields of `Verified`."""
    num_rows, num_positions, vocab_size = processed.shape
    num_drafts = num_positions - 1
    rejection = any_rejection and num_drafts > 0
    sampled = any_coupled or (any_rejection and num_drafts == 0)
    tile = STATISTICS_TILE if rejection else tile_size(num_rows * num_positions, vocab_size)
    num_tiles = cdiv(vocab_size, tile)
    tokens = drafts.new_empty((num_rows, num_positions))
    num_tokens, num_accepted = torch.empty_like(draft_counts), torch.empty_like(draft_counts)
    if num_rows == 0:
        return tokens, num_tokens, num_accepted
    words = drafts.new_empty((num_rows * num_positions, num_tiles))
    maxima = processed.new_empty((num_rows * num_positions, num_tiles) if rejection else 1, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    statistics = processed.new_empty((num_rows, 2), dtype=torch.float32)
    strides = (processed.stride(0), processed.stride(1))
    rows = (seed, first_position, temperature, is_coupled, divisor)
    divided, one_hot = divisor is not None, draft_probs is None
    _survey[(num_rows * num_positions, num_tiles)](
        words, maxima, sums, processed, *rows, vocab_size, num_positions, *strides,
        SAMPLED=sampled, REJECTION=rejection, DIVIDED=divided, TILE=tile, num_warps=warps_of(tile),
    )  # fmt: skip
    _settle[(num_rows,)](
        tokens, num_tokens, num_accepted, statistics, words, maxima, sums, processed, drafts, draft_counts,
        draft_probs, *rows, vocab_size, num_drafts, num_tiles, *strides,
        REJECTION=rejection, ONE_HOT=one_hot, DIVIDED=divided, TILES=power_of_2(num_tiles),
        STEPS=max(power_of_2(num_positions), MIN_STEPS), num_warps=4,
    )  # fmt: skip
    if rejection:
        spare_words = torch.empty_like(words)
        _redraw[(num_rows, num_tiles)](
            words, spare_words, num_accepted, statistics, processed, draft_counts, drafts, draft_probs,
            *rows, vocab_size, num_drafts, *strides,
            ONE_HOT=one_hot, DIVIDED=divided, TILE=tile, num_warps=warps_of(tile),
        )  # fmt: skip
        _finish[(num_rows,)](
            tokens, words, spare_words, num_accepted, temperature, is_coupled, vocab_size, num_drafts, num_tiles,
            TILES=power_of_2(num_tiles), num_warps=1,
        )  # fmt: skip
    return tokens, num_tokens, num_accepted
