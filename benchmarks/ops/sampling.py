"""One token a row of logits, greedy or drawn, and a draft's together with the softmax it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.ops.case import Case, Setting, copies, count, differing, relative
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.tokens import (
    draft_sample,
    draw_with_softmax_ref,
    greedy,
    greedy_ref,
    sample_tokens,
    sample_tokens_ref,
)


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        yield greedy_case(setting, rows)
        yield sampled_case(setting, rows)
        yield drafted_case(setting, rows)


def greedy_case(setting: Setting, rows: int) -> Case:
    size = 2 * rows * setting.shape.vocab
    logits = copies(lambda: setting.randn(rows, setting.shape.vocab), size)
    calls = [partial(greedy, one) for one in logits]
    return Case(f"greedy, {count(rows, 'row')}", calls, size, lambda: differing(calls[0](), greedy_ref(logits[0])))


def sampled_case(setting: Setting, rows: int) -> Case:
    size = 2 * rows * setting.shape.vocab
    seed = torch.arange(rows, device=setting.device)
    temperature = torch.full((rows,), 0.8, device=setting.device)
    inputs = copies(lambda: (setting.randn(rows, 1, setting.shape.vocab), temperature, seed, seed, temperature), size)
    calls = [partial(sample_tokens, *one) for one in inputs]
    return Case(
        f"sampled, {count(rows, 'row')}", calls, size, lambda: differing(calls[0](), sample_tokens_ref(*inputs[0]))
    )


def drafted_case(setting: Setting, rows: int) -> Case:
    size = 2 * 4 * rows * setting.shape.vocab
    seed, coupled = torch.arange(rows, device=setting.device), torch.zeros(rows, device=setting.device) > 0
    temperature = torch.ones(rows, device=setting.device)
    logits = copies(lambda: setting.randn(rows, setting.shape.vocab, scale=2.0, dtype=torch.float32), size)

    def error() -> float:
        tokens, q = draft_sample(logits[0], seed, seed, temperature, coupled)
        want = draw_with_softmax_ref(logits[0], seed, seed, temperature, torch.full_like(seed, Stream.DRAFT))
        assert q is not None
        return max(differing(tokens, want[0]), relative(q, want[1]))

    calls = [partial(draft_sample, one, seed, seed, temperature, coupled) for one in logits]
    return Case(f"drafted, {count(rows, 'row')}", calls, size, error)
