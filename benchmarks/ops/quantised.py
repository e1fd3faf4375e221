"""The products of few rows with weights of one byte, each of which is read once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, relative
from specserve_kernels.skinny.codes import CODES, Coded, Kind, decode, empty_coded, encode
from specserve_kernels.skinny.linear import arrivals, skinny_linear_ref
from specserve_kernels.skinny.quantised import quantised_linear

ROWS = (1, 8, 32)


def cases(setting: Setting) -> Iterator[Case]:
    shape = setting.shape
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for kind in CODES:
        for rows in ROWS:
            yield case(setting, kind, "qkv", rows, query + 2 * kv, shape.hidden, norms=True)
            yield case(setting, kind, "o", rows, shape.hidden, query, adds=True)
            yield case(setting, kind, "gate, up", rows, 2 * shape.intermediate, shape.hidden, norms=True, gated=True)
            yield case(setting, kind, "down", rows, shape.hidden, shape.intermediate, adds=True)
            yield case(setting, kind, "head", rows, shape.vocab, shape.hidden)


def case(
    setting: Setting, kind: Kind, name: str, rows: int, out: int, fan_in: int,
    *, adds: bool = False, norms: bool = False, gated: bool = False,
) -> Case:  # fmt: skip
    size = out * (fan_in + 4) + 2 * rows * (fan_in + (out // 2 if gated else out))
    norm = (setting.randn(fan_in), torch.tensor(1e-5, device=setting.device)) if norms else None
    run = partial(quantised_linear, norm=norm, gated=gated, arrivals=arrivals(setting.device))

    def buffers() -> tuple[Tensor, Coded, Tensor | None]:
        weight = empty_coded(kind, out, fan_in, setting.device)
        encode(setting.randn(out, fan_in, scale=fan_in**-0.5), weight)
        return setting.randn(rows, fan_in), weight, setting.randn(rows, out) if adds else None

    sets = copies(buffers, size)

    def error() -> float:
        x, weight, residual = sets[0]
        mine = None if residual is None else residual.clone()
        wide = None if residual is None else residual.float()
        wide_norm = None if norm is None else (norm[0].float(), norm[1])
        want = skinny_linear_ref(x.float(), decode(weight, torch.float32), wide, wide_norm, gated)
        return relative(run(x, weight, residual=mine), want)

    calls = [partial(run, x, weight, residual=residual) for x, weight, residual in sets]
    label = f"{kind} {name}" if rows == 1 else f"{kind} {name}, {rows} rows"
    return Case(label, calls, size, error, flops=2 * rows * out * fan_in)
