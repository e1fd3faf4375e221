"""The products of few rows with the model's weights, each of which is read once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.activation import silu_mul_ref
from specserve_kernels.lora.folded import Folded
from specserve_kernels.lora.grouped import SlotFactors, grouped_lora, grouped_lora_ref
from specserve_kernels.skinny.linear import is_skinny, skinny_linear, skinny_linear_ref, takes_lora

ROWS = (1, 8, 32)
ADAPTERS, RANK = 8, 16
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
        if is_skinny(setting.randn(2, shape.hidden)):  # where more than one row is a product of these kernels
            yield adapted(setting, "qkv", rows, (query, kv, kv), shape.hidden, "plain")
            yield adapted(setting, "o", rows, (shape.hidden,), query, "residual")
            yield adapted(setting, "gate, up", rows, (shape.intermediate,) * 2, shape.hidden, "gated")
            yield adapted(setting, "down", rows, (shape.hidden,), shape.intermediate, "residual")


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


def adapted(setting: Setting, name: str, rows: int, widths: tuple[int, ...], fan_in: int, kind: str) -> Case:
    """The product that multiplies by A and B of adapters too. A launch of its own says first that s is not there yet:
    in an engine that is done once a forward."""
    out, gated, used = sum(widths), kind == "gated", min(rows, ADAPTERS)
    size = 2 * (
        out * fan_in + used * RANK * (out + len(widths) * fan_in) + rows * (fan_in + (out // 2 if gated else out))
    )
    at = torch.arange(rows, device=setting.device)
    mix = (at, at[:, None] % ADAPTERS, torch.ones(rows, 1, device=setting.device))
    ranks = torch.full((ADAPTERS,), RANK, device=setting.device)

    def buffers() -> tuple[Tensor, Tensor, Tensor | None, SlotFactors]:
        a = setting.randn(ADAPTERS * len(widths) * RANK, fan_in, scale=fan_in**-0.5)
        factors = SlotFactors(a, setting.randn(ADAPTERS * RANK, out, scale=0.1), widths)
        x, weight = setting.randn(rows, fan_in), setting.randn(out, fan_in, scale=fan_in**-0.5)
        return x, weight, setting.randn(rows, out) if kind == "residual" else None, factors

    sets = copies(buffers, size)
    batch = grouped_lora([factors for *_, factors in sets], RANK, ranks, *mix)
    folded = [batch.fold(i, x) for i, (x, *_) in enumerate(sets)]
    assert takes_lora(sets[0][0], sets[0][1], sets[0][3]), (name, rows)

    def run(x: Tensor, weight: Tensor, residual: Tensor | None, lora: Folded) -> Tensor:
        lora.ready.zero_()
        return skinny_linear(x, weight, residual=residual, gated=gated, lora=lora)

    def error() -> float:
        x, weight, residual, (a, b, _) = sets[0]
        mine = None if residual is None else residual.clone()
        want = skinny_linear_ref(x.float(), weight.float(), None if residual is None else residual.float(), None, False)
        grouped_lora_ref(x.float(), want, SlotFactors(a.float(), b.float(), widths), *mix, ranks)
        return relative(run(x, weight, mine, folded[0]), silu_mul_ref(want) if gated else want)

    calls = [
        partial(run, x, weight, residual, lora) for (x, weight, residual, _), lora in zip(sets, folded, strict=True)
    ]
    return Case(
        f"{name}, {count(rows, 'row')}, {count(used, 'adapter')}", calls, size, error, flops=2 * rows * out * fan_in
    )
