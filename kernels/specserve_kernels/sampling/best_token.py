"""The best token of every row of logits on the GPU, with or without Gumbel noise.

A row is cut into tiles, so that even one row is read by all of the device: each tile's best token becomes one word
(`ordered.py`), and a second kernel takes each row's largest. The result does not depend on the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.language import cdiv, power_of_2, tl, triton
from specserve_kernels.launch import relaunched
from specserve_kernels.sampling.cut import Cut, load_logits
from specserve_kernels.sampling.dense import evenly_spaced
from specserve_kernels.sampling.kept_word import KEPT_WARPS, best_kept_word
from specserve_kernels.sampling.noise import gumbel, noise_key
from specserve_kernels.sampling.ordered import NO_WORD, best_word, word_token

CUT_TILE = 2048
ENOUGH_PROGRAMS = 512  # a few for each of the GPU's multiprocessors


@relaunched
@triton.jit(
    do_not_specialize=["num_positions"],
    do_not_specialize_on_alignment=["seed", "position", "stream", "temperature", "divisor"],
)
def _best_of_tile(
    words, logits, seed, position, stream, temperature, divisor, thresholds, last_ids,
    vocab, num_positions, distance,
    STREAM: tl.constexpr, SAMPLED: tl.constexpr, DIVIDED: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (row · Q + step, tile): words [rows · Q, tiles] of logits [rows, Q, vocab], the rest [rows]."""
    row = (tl.program_id(0) // num_positions).to(tl.int64)
    step = tl.program_id(0) % num_positions
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = tl.program_id(0).to(tl.int64) * distance
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if CUT:
        which = tl.load(stream + row) if STREAM < 0 else STREAM
        threshold, last_id = tl.load(thresholds + tl.program_id(0)), tl.load(last_ids + tl.program_id(0))
        key = noise_key(tl.load(seed + row), tl.load(position + row) + step, which)
        best = best_kept_word(
            logits, at, tl.program_id(1) * TILE, vocab, divisor, row, threshold, last_id, key,
            tl.load(temperature + row) > 0, DIVIDED, TILE,
        )  # fmt: skip
        tl.store(words + place, best)
        return
    x = load_logits(logits, at + token, token < vocab, divisor, row, DIVIDED)
    # a tile of impossible tokens only, as top_k leaves them, needs no noise
    if SAMPLED and tl.load(temperature + row) > 0 and tl.max(x, axis=0) > float("-inf"):
        which = tl.load(stream + row) if STREAM < 0 else STREAM
        x += gumbel(noise_key(tl.load(seed + row), tl.load(position + row) + step, which), token)
    tl.store(words + place, best_word(x, token))


@relaunched
@triton.jit(do_not_specialize=["num_tiles"])
def _best_of_row(tokens, words, num_tiles, vocab, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    best = tl.max(tl.load(words + row * num_tiles + tile, mask=tile < num_tiles, other=NO_WORD), axis=0)
    tl.store(tokens + row, word_token(best, vocab))


def tile_size(num_rows: int, vocab_size: int) -> int:
    """Tokens a program: large where the rows alone keep the GPU busy. Two sizes only: each is compiled anew."""
    return 4096 if num_rows >= rows_of_large_tiles(vocab_size) else 1024


def rows_of_large_tiles(vocab_size: int) -> int:
    """The fewest rows whose tiles are large."""
    return cdiv(ENOUGH_PROGRAMS, cdiv(vocab_size, 4096))


def warps_of(tile: int) -> int:
    """8 or 16 elements a thread: enough loads under way without spilling the noise's words."""
    return min(max(tile // 256, 4), 8)


def _where(cut: Cut | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cut is None else (cut.threshold, cut.last_id)


def best_tokens(
    logits: Tensor,
    seed: Tensor | None,
    position: Tensor | None,
    temperature: Tensor | None,
    stream: int | Tensor,
    divisor: Tensor | None,
    cut: Cut | None = None,
    tile: int | None = None,
) -> Tensor:
    """logits [B, Q, vocab], whose last dimension is dense; `cut` of these, for rows with noise; the rest [B] dense, or
    None: no noise, no division.

    `position` is that of the first of Q. Returns tokens [B, Q] int64.
    """
    num_rows, num_positions, vocab_size = logits.shape
    if cut is not None:
        tile = CUT_TILE
    tile = tile or tile_size(num_rows * num_positions, vocab_size)
    num_tiles = cdiv(vocab_size, tile)
    words = logits.new_empty((num_rows * num_positions, num_tiles), dtype=torch.int64)
    tokens = logits.new_empty((num_rows, num_positions), dtype=torch.int64)
    if tokens.numel() == 0:
        return tokens
    logits, distance = evenly_spaced(logits)
    _best_of_tile[(num_rows * num_positions, num_tiles)](
        words, logits, seed, position, None if isinstance(stream, int) else stream, temperature, divisor, *_where(cut),
        vocab_size, num_positions, distance,
        STREAM=int(stream) if isinstance(stream, int) else -1, SAMPLED=seed is not None, DIVIDED=divisor is not None,
        CUT=cut is not None, TILE=tile, num_warps=warps_of(tile) if cut is None else KEPT_WARPS,
    )  # fmt: skip
    _best_of_row[(num_rows * num_positions,)](
        tokens, words, num_tiles, vocab_size, TILES=power_of_2(num_tiles), num_warps=1
    )
    return tokens
