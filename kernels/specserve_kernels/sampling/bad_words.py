"""A token that would complete a forbidden sequence becomes impossible.

For row b let g be the tokens that it generated and then its drafts, N of the former. Position q of Q follows
n = N + D + 1 - Q + q of them. For each forbidden sequence w of length m that belongs to the row

    w[:m-1] = g[n-m+1 : n]   →   logits[b, q, w[m-1]] = −inf

and nothing else changes. A prompt is no part of g: a sequence that begins in it is not completed (vLLM's meaning).

logits [B, Q, vocab] float32 or float64. Sequences lie right-aligned in `words` [W, L] int64, ANY to their left, and
belong to the rows `word_rows` [W] int64. Row b's text is history[history_rows[b]] of history [R, width] int64: the
prompt up to output_starts[b], what was generated up to lengths[b] (both [B] int64), then anything. drafts [B, D]
int64, D ≥ Q − 1, past a row's count anything. No row's sequences may end in every token of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.language import power_of_2, tl, triton
from specserve_kernels.launch import relaunched

ANY = -1  # beside a sequence: whatever stands there
OUTSIDE = -2  # before what was generated: no token
MIN_BLOCK = 16  # sequences of up to 17 tokens compile once


def forbid_words_ref(
    logits: Tensor,
    drafts: Tensor,
    words: Tensor,
    word_rows: Tensor,
    history: Tensor,
    history_rows: Tensor,
    output_starts: Tensor,
    lengths: Tensor,
) -> Tensor:
    before, last = words[:, :-1], words[:, -1]  # [W, L-1], [W]
    num_before = before.shape[1]
    places = lengths.unsqueeze(1) + torch.arange(-num_before, 0, device=logits.device)  # [B, L-1]
    newest = history[history_rows.unsqueeze(1), places.clamp(min=0)]
    newest = newest.where(places >= output_starts.unsqueeze(1), OUTSIDE)
    generated = torch.cat((newest, drafts), dim=1)  # [B, L-1 + D]
    seen = generated.unfold(1, num_before, 1)[:, -logits.shape[1] :]  # [B, Q, L-1] right before each position
    same = (seen[word_rows] == before.unsqueeze(1)) | (before == ANY).unsqueeze(1)  # [W, Q, L-1]
    added = torch.where(same.all(-1), -torch.inf, 0.0).to(logits.dtype)  # [W, Q]
    by_token = logits.transpose(1, 2)  # [B, vocab, Q]
    return by_token.index_put((word_rows, last), added, accumulate=True).transpose(1, 2)


@relaunched
@triton.jit(
    do_not_specialize=["words_stride", "drafts_stride", "first", "num_positions", "num_before"],
    do_not_specialize_on_alignment=["drafts", "words", "word_rows", "history_rows", "output_starts", "lengths"],
)
def _forbid_kernel(
    logits, drafts, words, word_rows, history, history_rows, output_starts, lengths,
    words_stride, drafts_stride, width, vocab, first, num_positions, num_before,
    BLOCK: tl.constexpr, NOTHING: tl.constexpr, WHATEVER: tl.constexpr,
):  # fmt: skip
    """Program (w, q): one sequence at one position, behind first + q drafts. Several may forbid one token."""
    word, position = tl.program_id(0), tl.program_id(1)
    row = tl.load(word_rows + word)
    own = words + word * words_stride
    column = tl.arange(0, BLOCK)
    inside = column < num_before
    wanted = tl.load(own + column, mask=inside, other=WHATEVER)
    length = tl.load(lengths + row)
    place = length + first + position - num_before + column  # in the row's text, the drafts behind what is known
    known = place < length
    text = history + tl.load(history_rows + row) * width
    generated = tl.load(text + place, mask=inside & known & (place >= tl.load(output_starts + row)), other=NOTHING)
    drafted = tl.load(drafts + row * drafts_stride + (place - length), mask=inside & (place >= length), other=NOTHING)
    differs = (wanted != WHATEVER) & (wanted != tl.where(known, generated, drafted))
    if tl.sum(differs.to(tl.int32), axis=0) == 0:
        last = tl.load(own + num_before)
        tl.store(logits + (row * num_positions + position) * vocab + last, float("-inf"))


def forbid_words_triton(
    logits: Tensor,
    drafts: Tensor,
    words: Tensor,
    word_rows: Tensor,
    history: Tensor,
    history_rows: Tensor,
    output_starts: Tensor,
    lengths: Tensor,
) -> Tensor:
    logits = logits.clone(memory_format=torch.contiguous_format)
    num_positions, vocab = logits.shape[1:]
    num_before = words.shape[1] - 1
    _forbid_kernel[(words.shape[0], num_positions)](
        logits, drafts, words, word_rows, history, history_rows, output_starts, lengths,
        words.stride(0), drafts.stride(0), history.shape[1], vocab,
        drafts.shape[1] + 1 - num_positions, num_positions, num_before,
        BLOCK=max(power_of_2(max(num_before, 1)), MIN_BLOCK), NOTHING=OUTSIDE, WHATEVER=ANY, num_warps=1,
    )  # fmt: skip
    return logits


_IMPLEMENTATIONS = {"torch": forbid_words_ref, "triton": forbid_words_triton}


def forbid_words(
    logits: Tensor,
    drafts: Tensor,
    words: Tensor,
    word_rows: Tensor,
    history: Tensor,
    history_rows: Tensor,
    output_starts: Tensor,
    lengths: Tensor,
) -> Tensor:
    """The logits without the tokens that would complete a sequence, a new tensor. Nothing is read from the device."""
    assert words.stride(1) == 1 and (drafts.shape[1] < 2 or drafts.stride(1) == 1)
    assert history.is_contiguous() and drafts.shape[1] >= logits.shape[1] - 1
    columns = (word_rows, history_rows, output_starts, lengths)
    assert all(one.shape[0] < 2 or one.stride(0) == 1 for one in columns), "kernels want each column dense"
    run = _IMPLEMENTATIONS[backend(logits, _IMPLEMENTATIONS)]
    return run(logits, drafts, words, word_rows, history, history_rows, output_starts, lengths)
