"""Forbidden token sequences: a float32 copy of the logits, and few bytes of sequences and texts besides."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.ops.case import Case, Setting, copies, count, differing
from specserve_kernels.sampling.bad_words import forbid_words, forbid_words_ref

WORDS, LENGTH = 16, 4  # of each row
DRAFTS = 4
WIDTH = 4096  # of the histories


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        yield case(setting, rows)


def case(setting: Setting, rows: int) -> Case:
    size = 2 * 4 * rows * (DRAFTS + 1) * setting.shape.vocab  # read once, written once
    device = setting.device
    index = torch.arange(rows, device=device)
    words = torch.randint(2, (rows * WORDS, LENGTH), device=device)  # likely tokens, so that some have begun
    texts = torch.randint(2, (rows, WIDTH), device=device)
    drafts = torch.randint(2, (rows, DRAFTS), device=device)
    arguments = (drafts, words, index.repeat_interleave(WORDS), texts, index, index + 1, index + WIDTH // 2)
    logits = copies(lambda: setting.randn(rows, DRAFTS + 1, setting.shape.vocab, dtype=torch.float32), size)
    calls = [partial(forbid_words, one, *arguments) for one in logits]
    return Case(
        f"{count(rows, 'row')} of {WORDS} words", calls, size,
        lambda: differing(calls[0](), forbid_words_ref(logits[0], *arguments)),
    )  # fmt: skip
