"""Selection of the likeliest tokens: reads float32 logits, writes them masked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count
from specserve_kernels.sampling.selection import top_k_top_p, top_k_top_p_ref

TOP_K = 50


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        yield case(setting, rows, TOP_K, 0.95)
        yield case(setting, rows, 0, 0.95)
    yield case(setting, setting.rows[-1], TOP_K, math.inf)


def case(setting: Setting, rows: int, k: int, p: float) -> Case:
    vocab = setting.shape.vocab
    size = 2 * 4 * rows * vocab
    top_k = torch.full((rows,), k or vocab, device=setting.device)
    top_p = torch.full((rows,), p, device=setting.device)

    def peaky() -> Tensor:
        logits = setting.randn(rows, 1, vocab, scale=2.0, dtype=torch.float32)
        logits[..., ::997] += 12  # as a model's: nearly all of the mass on few tokens
        return logits

    logits = copies(peaky, size)
    any_p, alone = p < 1, p < 1 and not k
    run = partial(top_k_top_p, max_top_k=k, any_top_p=any_p, any_top_p_alone=alone)

    def error() -> float:
        """The tokens that differ, as a share of those kept."""
        want = top_k_top_p_ref(logits[0].double(), top_k, top_p.double(), k, any_p, alone).isfinite()
        return float((run(logits[0], top_k, top_p).isfinite() != want).sum() / want.sum())

    name = ", ".join([f"top_k {k}"] * (k > 0) + [f"top_p {p}"] * any_p + [count(rows, "row")])
    return Case(name, [partial(run, one, top_k, top_p) for one in logits], size, error)
