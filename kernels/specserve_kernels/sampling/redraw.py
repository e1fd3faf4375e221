"""The token after the accepted drafts of rejection rows: of verification.py, the kernels that run for these alone."""

from __future__ import annotations

import torch

from specserve_kernels.language import tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.cut import cut_off, drafted_probability, load_logits
from specserve_kernels.sampling.noise import gumbel, noise_key
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.softmax_parts import probability

_RESIDUAL = tl.constexpr(int(Stream.RESIDUAL))
_SAMPLE = tl.constexpr(int(Stream.SAMPLE))
_TINY = tl.constexpr(float(torch.finfo(torch.float32).tiny))
PROBS, SOFTMAX = tl.constexpr(1), tl.constexpr(2)  # how q is told; 0: one-hot
FLAGS = ["temperature", "is_coupled"]
_CUT = ["thresholds", "last_ids", "cut_largest", "cut_totals"]
DRAFTED_BY = ["q_logits", "q_divisor", "q_thresholds", "q_last_ids", "q_largest", "q_totals"]
# one number a row: its alignment is nothing to compile for
ROWS = ["seed", "first_position", *FLAGS, "divisor", *_CUT]


@triton.jit
def is_rejection(is_coupled, temperature, row):
    return (tl.load(is_coupled + row) == 0) & (tl.load(temperature + row) > 0)


@relaunched
@triton.jit(
    do_not_specialize=["num_drafts"], do_not_specialize_on_alignment=[*ROWS, "drafts", "draft_counts", *DRAFTED_BY]
)
def redraw(
    words, spare_words, num_accepted, statistics, logits, draft_counts, drafts,
    q_logits, q_divisor, q_thresholds, q_last_ids, q_largest, q_totals,
    seed, first_position, temperature, is_coupled, divisor, thresholds, last_ids,
    vocab, num_drafts, distance,
    DRAFTED: tl.constexpr, Q_DIVIDED: tl.constexpr, DIVIDED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Best word of the residual (p − q)₊, or, in a tile where it is nothing, the spare one of p itself: if it is
    nothing in all tiles, the rejection was rounding error and p is the answer.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not is_rejection(is_coupled, temperature, row):
        return
    accepted = tl.load(num_accepted + row)
    rejected = accepted < tl.load(draft_counts + row)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    position = row * (num_drafts + 1) + accepted
    x = load_logits(logits, position * distance + token, inside, divisor, row, DIVIDED)
    if CUT:
        x = cut_off(x, token, thresholds, last_ids, position)
    place = row * tl.num_programs(1) + tile
    if tl.max(x, axis=0) == float("-inf"):  # most tiles after top_k
        tl.store(words + place, NO_WORD)
        tl.store(spare_words + place, NO_WORD)
        return
    stream = tl.where(rejected, _RESIDUAL, _SAMPLE)
    noise = gumbel(noise_key(tl.load(seed + row), tl.load(first_position + row) + accepted, stream), token)
    if rejected:
        p = probability(x, tl.load(statistics + row * 2), tl.load(statistics + row * 2 + 1))
        drawn = row * num_drafts + accepted
        draft = tl.load(drafts + drawn)
        if DRAFTED == PROBS:
            q = tl.load(q_logits + drawn * vocab + token, mask=inside, other=0.0).to(tl.float32)
        elif DRAFTED == SOFTMAX:
            q = drafted_probability(
                q_logits, q_divisor, q_thresholds, q_last_ids, q_largest, q_totals,
                drawn * vocab + token, inside, drawn, rejected, row, token, draft, Q_DIVIDED,
            )  # fmt: skip
        else:
            q = tl.where(token == draft, 1.0, 0.0)
        residual = p - q
        has_residual = tl.max(residual, axis=0) > 0
        mass = tl.where(has_residual, residual, p)
        word = best_word(tl.where(mass > 0, tl.log(tl.maximum(mass, _TINY)) + noise, float("-inf")), token)
        tl.store(words + place, tl.where(has_residual, word, NO_WORD))
        tl.store(spare_words + place, tl.where(has_residual, NO_WORD, word))
    else:
        tl.store(words + place, best_word(x + noise, token))
        tl.store(spare_words + place, NO_WORD)


@relaunched
@triton.jit(do_not_specialize=["num_drafts", "num_tiles"], do_not_specialize_on_alignment=FLAGS)
def finish(
    tokens, words, spare_words, num_accepted, temperature, is_coupled, vocab, num_drafts, num_tiles, TILES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    if not is_rejection(is_coupled, temperature, row):
        return
    tile = tl.arange(0, TILES)
    best = tl.max(tl.load(words + row * num_tiles + tile, mask=tile < num_tiles, other=NO_WORD), axis=0)
    spare = tl.max(tl.load(spare_words + row * num_tiles + tile, mask=tile < num_tiles, other=NO_WORD), axis=0)
    token = word_token(tl.where(best == NO_WORD, spare, best), vocab)
    tl.store(tokens + row * (num_drafts + 1) + tl.load(num_accepted + row), token)
