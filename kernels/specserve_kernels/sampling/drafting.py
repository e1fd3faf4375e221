"""A draft's token by Gumbel-max, together with the exact softmax that it was drawn from, in two passes on the GPU.

The first leaves each tile's best word (`ordered.py`) and softmax statistics (`softmax_parts.py`); in the second every
program puts its row's together and writes its tile of the softmax, the first tile's the token as well.
The reference is `sampling.draw_with_softmax_ref`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.sampling.noise import gumbel, noise_key
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token
from specserve_kernels.sampling.softmax_parts import STATISTICS_TILE, probability, row_statistics, tile_statistics


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
