"""The n-gram lookup: reads each row's tokens once, finds what followed the newest ones, in histories of full width."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, differing
from specserve.speculation.ngram import MAX_NGRAM, MIN_NGRAM
from specserve_kernels.ngram import ngram_lookup, ngram_lookup_ref

DRAFTS = 4
WIDTH = 32768  # of the histories, whatever the texts' lengths


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        for context in setting.contexts:
            yield case(setting, rows, context)


def case(setting: Setting, rows: int, context: int) -> Case:
    size = 8 * rows * context
    device = setting.device
    index = torch.arange(rows, device=device)
    lengths, limits = torch.full_like(index, context), torch.full_like(index, DRAFTS)

    def texts() -> Tensor:
        return torch.randint(setting.shape.vocab // 100 + 2, (rows, max(WIDTH, context)), device=device)

    histories = copies(texts, 8 * rows * WIDTH)
    arguments = lengths, index, limits, DRAFTS
    run = partial(ngram_lookup, min_ngram=MIN_NGRAM, max_ngram=MAX_NGRAM)

    def error() -> float:
        got = run(histories[0], *arguments)
        want = ngram_lookup_ref(histories[0], *arguments, MIN_NGRAM, MAX_NGRAM)
        return max(differing(*pair) for pair in zip(got, want, strict=True))

    name = f"{count(rows, 'row')} of {context}"
    return Case(name, [partial(run, history, *arguments) for history in histories], size, error)
