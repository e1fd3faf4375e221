"""RMSNorm of hidden states: reads and writes them once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.norm import rms_norm, rms_norm_ref


def cases(setting: Setting) -> Iterator[Case]:
    for tokens in (*setting.rows, setting.prompt):
        yield case(setting, tokens)


def case(setting: Setting, tokens: int) -> Case:
    hidden = setting.shape.hidden
    weight, eps = setting.randn(hidden), torch.tensor(1e-5, device=setting.device)
    size = 2 * 2 * tokens * hidden
    xs = copies(lambda: setting.randn(tokens, hidden), size)

    def error() -> float:
        return relative(rms_norm(xs[0], weight, eps), rms_norm_ref(xs[0].float(), weight.float(), eps))

    return Case(count(tokens, "token"), [partial(rms_norm, x, weight, eps) for x in xs], size, error)
