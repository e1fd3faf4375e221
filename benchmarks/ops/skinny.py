"""The products of few rows with the model's weights, each of which is read once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, relative
from specserve_kernels.skinny.linear import is_skinny, skinny_linear, skinny_linear_ref

ROWS = (1, 8, 32)
Kind = Literal["norm", "residual", "norm, gated", "plain"]


def cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for rows in ROWS:
        if rows > 1 and not is_skinny(setting.randn(rows, shape.hidden)):
            continue  # so many are the library's
        yield case(setting, "qkv", rows, query + 2 * kv, shape.hidden, "norm")
        yield case(setting, "o", rows, shape.hidden, query, "residual")
        yield case(setting, "gate, up", rows, 2 * shape.intermediate, shape.hidden, "norm, gated")
        yield case(setting, "down", rows, shape.hidden, shape.intermediate, "residual")
        yield case(setting, "head", rows, shape.vocab, shape.hidden, "plain")


def case(setting: Setting, name: str, rows: int, out: int, fan_in: int, kind: Kind) -> Case:
    size = 2 * (out * fan_in + rows * (fan_in + (out // 2 if "gated" in kind else out)))
    norm = (setting.randn(fan_in), torch.tensor(1e-5, device=setting.device)) if "norm" in kind else None

    def buffers() -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = setting.randn(rows, fan_in), setting.randn(out, fan_in, scale=fan_in**-0.5)
        return x, weight, setting.randn(rows, out) if kind == "residual" else None

    sets = copies(buffers, size)
    run = partial(skinny_linear, norm=norm, gated="gated" in kind)

    def error() -> float:
        x, weight, residual = sets[0]
        mine = None if residual is None else residual.clone()
        wide = None if residual is None else residual.float()
        wide_norm = None if norm is None else (norm[0].float(), norm[1])
        want = skinny_linear_ref(x.float(), weight.float(), wide, wide_norm, "gated" in kind)
        return relative(run(x, weight, residual=mine), want)

    calls = [partial(run, x, weight, residual=residual) for x, weight, residual in sets]
    return Case(name if rows == 1 else f"{name}, {rows} rows", calls, size, error, flops=2 * rows * out * fan_in)
