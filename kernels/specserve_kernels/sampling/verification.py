"""`rejection.verify` on the GPU: the vocabulary is streamed once, and once more for one position of a rejection row.

    survey    (row · position, tile)  best word, or softmax statistics of p in a rejection row
    settle    (row)                   tokens, acceptance, counts; p's statistics at a rejection row's last position
    redraw    (row, tile)             rejection rows: best word of the residual, or of the target after the last draft
    finish    (row)                   rejection rows: the redrawn token into its place

The last two run only where some row is a rejection row. Nothing of the size of the vocabulary is written. Where top_k
or top_p are in use, p is given by the numbers of `cut.py`, and the survey passes rejection rows by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.best_token import tile_size, warps_of
from specserve_kernels.sampling.cut import Cut, DraftSoftmax, drafted_probability, load_logits, stays
from specserve_kernels.sampling.dense import evenly_spaced
from specserve_kernels.sampling.kept_word import KEPT_WARPS, best_kept_word
from specserve_kernels.sampling.noise import gumbel, noise_key, uniform
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.redraw import DRAFTED_BY, PROBS, ROWS, SOFTMAX, finish, is_rejection, redraw
from specserve_kernels.sampling.softmax_parts import STATISTICS_TILE, probability, row_statistics, tile_statistics

MIN_STEPS = 16  # positions in one register tile: up to 15 drafts compile once
_ACCEPT = tl.constexpr(int(Stream.ACCEPT))
_SAMPLE = tl.constexpr(int(Stream.SAMPLE))


@relaunched
@triton.jit(do_not_specialize=["num_positions"], do_not_specialize_on_alignment=ROWS)
def _survey(
    words, maxima, sums, logits, seed, first_position, temperature, is_coupled, divisor, thresholds, last_ids,
    vocab, num_positions, distance,
    SAMPLED: tl.constexpr, REJECTION: tl.constexpr, DIVIDED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // num_positions).to(tl.int64)
    if CUT and REJECTION and is_rejection(is_coupled, temperature, row):
        return
    step, tile = tl.program_id(0) % num_positions, tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tile
    token = tile * TILE + tl.arange(0, TILE)
    at = tl.program_id(0).to(tl.int64) * distance
    if CUT:
        threshold, last_id = tl.load(thresholds + tl.program_id(0)), tl.load(last_ids + tl.program_id(0))
        key = noise_key(tl.load(seed + row), tl.load(first_position + row) + step, _SAMPLE)
        best = best_kept_word(
            logits, at, tile * TILE, vocab, divisor, row, threshold, last_id, key, tl.load(temperature + row) > 0,
            DIVIDED, TILE,
        )  # fmt: skip
        tl.store(words + place, best)
        return
    x = load_logits(logits, at + token, token < vocab, divisor, row, DIVIDED)
    if REJECTION and is_rejection(is_coupled, temperature, row):
        largest, total = tile_statistics(x)
        tl.store(maxima + place, largest)
        tl.store(sums + place, total)
        return
    if SAMPLED and tl.load(temperature + row) > 0 and tl.max(x, axis=0) > float("-inf"):
        x += gumbel(noise_key(tl.load(seed + row), tl.load(first_position + row) + step, _SAMPLE), token)
    tl.store(words + place, best_word(x, token))


@relaunched
@triton.jit(
    do_not_specialize=["num_drafts", "num_tiles"],
    do_not_specialize_on_alignment=[*ROWS, "logits", "drafts", "draft_counts", *DRAFTED_BY],
)
def _settle(
    tokens, num_tokens, num_accepted, statistics,
    words, maxima, sums, logits, drafts, draft_counts,
    q_logits, q_divisor, q_thresholds, q_last_ids, q_largest, q_totals,
    seed, first_position, temperature, is_coupled, divisor, thresholds, last_ids, cut_largest, cut_totals,
    vocab, num_drafts, num_tiles, distance,
    REJECTION: tl.constexpr, DRAFTED: tl.constexpr, Q_DIVIDED: tl.constexpr, DIVIDED: tl.constexpr, CUT: tl.constexpr,
    STEPS: tl.constexpr, TILES: tl.constexpr,
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
    if REJECTION and is_rejection(is_coupled, temperature, row):
        position, is_step = row * (num_drafts + 1) + step, step <= num_drafts
        x = load_logits(logits, position * distance + draft, valid, divisor, row, DIVIDED)
        if CUT:
            threshold = tl.load(thresholds + position, mask=is_step, other=0.0)
            last_id = tl.load(last_ids + position, mask=is_step, other=0)
            largest = tl.load(cut_largest + position, mask=is_step, other=0.0)
            total = tl.load(cut_totals + position, mask=is_step, other=1.0)
            x = tl.where(stays(x, draft, threshold, last_id), x, float("-inf"))
        else:
            parts_m = tl.load(maxima + place, mask=exists, other=float("-inf"))
            parts_s = tl.load(sums + place, mask=exists, other=0.0)
            largest, total = row_statistics(parts_m, parts_s, 1)
        p = probability(x, largest, total)
        bar = uniform(noise_key(tl.load(seed + row), tl.load(first_position + row) + step, _ACCEPT))
        drawn = row * num_drafts + step
        if DRAFTED == PROBS:
            q = tl.load(q_logits + drawn * vocab + draft, mask=valid, other=0.0)
            bar = bar * q.to(tl.float64)
        elif DRAFTED == SOFTMAX:
            q = drafted_probability(
                q_logits, q_divisor, q_thresholds, q_last_ids, q_largest, q_totals,
                drawn * vocab + draft, valid, drawn, valid, row, draft, draft, Q_DIVIDED,
            )  # fmt: skip
            bar = bar * q.to(tl.float64)
        refused = tl.where(valid & (bar >= p.to(tl.float64)), step, num_drafts)
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


def _drafted(draft_probs: Tensor | DraftSoftmax | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """Which kind q is, and the arguments that hold it."""
    if draft_probs is None:
        return 0, (None,) * 6
    if isinstance(draft_probs, DraftSoftmax):
        return 2, (draft_probs.logits, draft_probs.divisor, *draft_probs.cut)
    return 1, (draft_probs, *(None,) * 5)


def verify_triton(
    processed: Tensor,
    drafts: Tensor,
    draft_counts: Tensor,
    draft_probs: Tensor | DraftSoftmax | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    divisor: Tensor | None,
    cut: Cut | None,
    any_coupled: bool,
    any_rejection: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors as in `rejection.verify`, dense but for processed's first two dimensions; the fields of `Verified`."""
    num_rows, num_positions, vocab_size = processed.shape
    num_drafts = num_positions - 1
    rejection = any_rejection and num_drafts > 0
    sampled = any_coupled or (any_rejection and not rejection)  # without, a survey needs half the registers
    tile = STATISTICS_TILE if rejection or cut is not None else tile_size(num_rows * num_positions, vocab_size)
    num_tiles = cdiv(vocab_size, tile)
    tokens = drafts.new_empty((num_rows, num_positions))
    num_tokens, num_accepted = torch.empty_like(draft_counts), torch.empty_like(draft_counts)
    if num_rows == 0:
        return tokens, num_tokens, num_accepted
    words = drafts.new_empty((num_rows * num_positions, num_tiles))
    parts = (num_rows * num_positions, num_tiles) if rejection and cut is None else (1,)
    maxima = processed.new_empty(parts, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    statistics = processed.new_empty((num_rows, 2), dtype=torch.float32)
    processed, distance = evenly_spaced(processed)
    numbers: tuple[Tensor | None, ...] = (None,) * 4 if cut is None else cut
    kind, q = _drafted(draft_probs)
    rows = (seed, first_position, temperature, is_coupled)
    p = (divisor, *numbers[:2])
    how = {"DIVIDED": divisor is not None, "CUT": cut is not None}
    drafted = {"DRAFTED": kind, "Q_DIVIDED": q[1] is not None}
    _survey[(num_rows * num_positions, num_tiles)](
        words, maxima, sums, processed, *rows, *p, vocab_size, num_positions, distance,
        SAMPLED=sampled or cut is not None, REJECTION=rejection or cut is not None, **how, TILE=tile,
        num_warps=warps_of(tile) if cut is None else KEPT_WARPS,
    )  # fmt: skip
    settled = (tokens, num_tokens, num_accepted, statistics, words, maxima, sums)
    sizes = (vocab_size, num_drafts, num_tiles, distance)
    shape = {"TILES": power_of_2(num_tiles), "STEPS": max(power_of_2(num_positions), MIN_STEPS), "num_warps": 4}
    if not rejection:  # it reads words alone: one kernel, whatever the logits and the drafts' distribution are
        _settle[(num_rows,)](
            *settled, None, drafts, draft_counts, *(None,) * 6, *rows, *(None,) * 5, *sizes,
            REJECTION=False, DRAFTED=0, Q_DIVIDED=False, DIVIDED=False, CUT=False, **shape,
        )  # fmt: skip
        return tokens, num_tokens, num_accepted
    _settle[(num_rows,)](
        *settled, processed, drafts, draft_counts, *q, *rows, *p, *numbers[2:], *sizes,
        REJECTION=True, **drafted, **how, **shape,
    )  # fmt: skip
    spare_words = torch.empty_like(words)
    redraw[(num_rows, num_tiles)](
        words, spare_words, num_accepted, statistics, processed, draft_counts, drafts, *q,
        *rows, *p, vocab_size, num_drafts, distance, **drafted, **how, TILE=tile, num_warps=warps_of(tile),
    )  # fmt: skip
    finish[(num_rows,)](
        tokens, words, spare_words, num_accepted, temperature, is_coupled, vocab_size, num_drafts, num_tiles,
        TILES=power_of_2(num_tiles), num_warps=1,
    )  # fmt: skip
    return tokens, num_tokens, num_accepted
