"""A draft's token by Gumbel-max, together with the exact softmax that it was drawn from, in two passes on the GPU.

The first leaves each tile's best word (`ordered.py`) and softmax statistics (`softmax_parts.py`); in the second every
program puts its row's together and writes its tile of the softmax, the first tile's the token as well.
The reference is `sampling.draw_with_softmax_ref`.

`draw_kept` is for a proposer whose drafts are verified next. It writes no softmax: it copies the logits as it reads
them and adds the numbers of `cut.py`, from which `rejection.verify` has the same probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.cut import Cut, DraftSoftmax, divide
from specserve_kernels.sampling.dense import evenly_spaced
from specserve_kernels.sampling.kept_word import KEPT_WARPS, best_kept_word
from specserve_kernels.sampling.noise import gumbel, noise_key
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.softmax_parts import STATISTICS_TILE, probability, row_statistics, tile_statistics

_SAMPLE, _DRAFT = tl.constexpr(int(Stream.SAMPLE)), tl.constexpr(int(Stream.DRAFT))
_CUT = ["thresholds", "last_ids", "cut_largest", "cut_totals"]


@relaunched
@triton.jit(do_not_specialize_on_alignment=["seed", "position", "stream", "temperature"])
def _survey_tile(
    words, maxima, sums, logits, seed, position, stream, temperature, vocab, stride_row, TILE: tl.constexpr
):
    """Program (row, tile): words, maxima, sums [rows, tiles] of logits [rows, vocab]; the rest [rows]."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    place = row * tl.num_programs(1) + tile
    largest, total = tile_statistics(x)
    tl.store(maxima + place, largest)
    tl.store(sums + place, total)
    if tl.load(temperature + row) > 0 and largest > float("-inf"):
        x += gumbel(noise_key(tl.load(seed + row), tl.load(position + row), tl.load(stream + row)), token)
    tl.store(words + place, best_word(x, token))


@relaunched
@triton.jit(do_not_specialize=["num_tiles"])
def _softmax_tile(
    tokens, probs, words, maxima, sums, logits, vocab, num_tiles, stride_row, TILE: tl.constexpr, TILES: tl.constexpr
):
    """Program (row, tile): probs [rows, vocab] float32, tokens [rows] int64."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, TILES)
    place = row * num_tiles + part
    parts_m = tl.load(maxima + place, mask=part < num_tiles, other=float("-inf"))
    parts_s = tl.load(sums + place, mask=part < num_tiles, other=0.0)
    largest, total = row_statistics(parts_m, parts_s, 0)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row * stride_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    tl.store(probs + row * vocab + token, probability(x, largest, total), mask=token < vocab)
    if tile == 0:
        best = tl.max(tl.load(words + place, mask=part < num_tiles, other=NO_WORD), axis=0)
        tl.store(tokens + row, word_token(best, vocab))


def draw_with_softmax(
    processed: Tensor, seed: Tensor, position: Tensor, temperature: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor]:
    """processed [B, vocab] float, dense in its last dimension; the rest [B]. Returns tokens [B] int64, q [B, vocab]."""
    num_rows, vocab_size = processed.shape
    num_tiles = cdiv(vocab_size, STATISTICS_TILE)
    maxima = processed.new_empty((num_rows, num_tiles), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    words = processed.new_empty((num_rows, num_tiles), dtype=torch.int64)
    tokens = processed.new_empty((num_rows,), dtype=torch.int64)
    probs = processed.new_empty((num_rows, vocab_size), dtype=torch.float32)
    if num_rows == 0:
        return tokens, probs
    grid = (num_rows, num_tiles)
    _survey_tile[grid](
        words, maxima, sums, processed, seed.contiguous(), position.contiguous(), stream.contiguous(),
        temperature.contiguous(), vocab_size, processed.stride(0), TILE=STATISTICS_TILE, num_warps=4,
    )  # fmt: skip
    _softmax_tile[grid](
        tokens, probs, words, maxima, sums, processed, vocab_size, num_tiles, processed.stride(0),
        TILE=STATISTICS_TILE, TILES=power_of_2(num_tiles), num_warps=4,
    )  # fmt: skip
    return tokens, probs


@relaunched
@triton.jit(
    do_not_specialize=["num_drafts", "step"],
    do_not_specialize_on_alignment=["seed", "position", "is_coupled", "temperature", "divisor", *_CUT],
)
def _copy_and_survey(
    words, maxima, sums, kept, logits, seed, position, is_coupled, temperature, divisor, thresholds, last_ids,
    vocab, distance, num_drafts, step, DIVIDED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `_survey_tile`, of raw logits, which go to kept [rows, num_drafts, vocab], draft `step`; with a cut no
    statistics are wanted."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < vocab
    raw = tl.load(logits + row * distance + token, mask=inside, other=float("-inf"))
    tl.store(kept + (row * num_drafts + step) * vocab + token, raw, mask=inside)
    place = row * tl.num_programs(1) + tile
    is_noisy = tl.load(temperature + row) > 0
    stream = tl.where(tl.load(is_coupled + row) != 0, _SAMPLE, _DRAFT)
    key = noise_key(tl.load(seed + row), tl.load(position + row), stream)
    if CUT:
        best = best_kept_word(
            logits, row * distance, tile * TILE, vocab, divisor, row, tl.load(thresholds + row),
            tl.load(last_ids + row), key, is_noisy, DIVIDED, TILE,
        )  # fmt: skip
        tl.store(words + place, best)
        return
    x = raw.to(tl.float32)
    if DIVIDED:
        x = divide(x, tl.load(divisor + row).to(tl.float32))
    largest, total = tile_statistics(x)
    tl.store(maxima + place, largest)
    tl.store(sums + place, total)
    if is_noisy and largest > float("-inf"):
        x += gumbel(key, token)
    tl.store(words + place, best_word(x, token))


@relaunched
@triton.jit(
    do_not_specialize=["num_drafts", "step"],
    do_not_specialize_on_alignment=["q_thresholds", "q_last_ids", "q_largest", "q_totals", *_CUT],
)
def _conclude(
    tokens, q_thresholds, q_last_ids, q_largest, q_totals, words, maxima, sums,
    thresholds, last_ids, cut_largest, cut_totals,
    vocab, num_tiles, num_drafts, step, CUT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (row): tokens [rows] int64, and the numbers of draft `step` among [rows, num_drafts]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, TILES)
    place = row * num_tiles + part
    best = tl.max(tl.load(words + place, mask=part < num_tiles, other=NO_WORD), axis=0)
    tl.store(tokens + row, word_token(best, vocab))
    drawn = row * num_drafts + step
    if CUT:
        tl.store(q_thresholds + drawn, tl.load(thresholds + row))
        tl.store(q_last_ids + drawn, tl.load(last_ids + row))
        tl.store(q_largest + drawn, tl.load(cut_largest + row))
        tl.store(q_totals + drawn, tl.load(cut_totals + row))
    else:
        parts_m = tl.load(maxima + place, mask=part < num_tiles, other=float("-inf"))
        parts_s = tl.load(sums + place, mask=part < num_tiles, other=0.0)
        largest, total = row_statistics(parts_m, parts_s, 0)
        tl.store(q_thresholds + drawn, float("-inf"))
        tl.store(q_last_ids + drawn, vocab)
        tl.store(q_largest + drawn, largest)
        tl.store(q_totals + drawn, total)


def new_softmax(logits: Tensor, divisor: Tensor | None, num_drafts: int) -> DraftSoftmax:
    """Memory for what `num_drafts` drafts of each row are drawn from, the logits [B, vocab] of each like these."""
    num_rows, vocab_size = logits.shape
    floats = [logits.new_empty((num_rows, num_drafts), dtype=torch.float32) for _ in range(3)]
    last_id = logits.new_empty((num_rows, num_drafts), dtype=torch.int32)
    kept = logits.new_empty((num_rows, num_drafts, vocab_size))
    return DraftSoftmax(kept, divisor, Cut(floats[0], last_id, floats[1], floats[2]))


def draw_kept(
    logits: Tensor, cut: Cut | None, seed: Tensor, position: Tensor, temperature: Tensor, is_coupled: Tensor,
    q: DraftSoftmax, step: int,
) -> Tensor:  # fmt: skip
    """Draft `step` of each row from logits [B, vocab], dense in its last dimension, and what it was drawn from into
    `q`; cut: of [B, 1] rows; the rest [B]. Returns tokens [B] int64.
    """
    num_rows, vocab_size = logits.shape
    assert logits.dtype == q.logits.dtype, (logits.dtype, q.logits.dtype)
    num_tiles, num_drafts = cdiv(vocab_size, STATISTICS_TILE), q.logits.shape[1]
    words = logits.new_empty((num_rows, num_tiles), dtype=torch.int64)
    maxima = logits.new_empty((num_rows, num_tiles) if cut is None else (1,), dtype=torch.float32)
    sums = torch.empty_like(maxima)
    tokens = logits.new_empty((num_rows,), dtype=torch.int64)
    if num_rows == 0:
        return tokens
    divisor = None if q.divisor is None else q.divisor.contiguous()
    numbers: tuple[Tensor | None, ...] = (None,) * 4 if cut is None else cut
    logits, distance = evenly_spaced(logits.unsqueeze(1))
    _copy_and_survey[(num_rows, num_tiles)](
        words, maxima, sums, q.logits, logits, seed.contiguous(), position.contiguous(),
        is_coupled.contiguous(), temperature.contiguous(), divisor, *numbers[:2],
        vocab_size, distance, num_drafts, step,
        DIVIDED=divisor is not None, CUT=cut is not None, TILE=STATISTICS_TILE,
        num_warps=4 if cut is None else KEPT_WARPS,
    )  # fmt: skip
    _conclude[(num_rows,)](
        tokens, *q.cut, words, maxima, sums, *numbers, vocab_size, num_tiles, num_drafts, step,
        CUT=cut is not None, TILES=power_of_2(num_tiles), num_warps=1,
    )  # fmt: skip
    return tokens
