"""The adapters' products of one layer's four linears: reads the factors of the adapters in use, x, and y twice."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.dispatch import runs_triton
from specserve_kernels.lora.grouped import SlotFactors, grouped_lora, grouped_lora_ref

ADAPTERS, RANK = 8, 16


def cases(setting: Setting) -> Iterator[Case]:
    for tokens in (*setting.rows, setting.prompt):
        yield case(setting, tokens)


def case(setting: Setting, tokens: int) -> Case:
    """The requests of the batch take the adapters in turn, and have as many tokens each."""
    shape, device, rows = setting.shape, setting.device, min(tokens, setting.rows[-1])
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    inner, out = (shape.intermediate,), (shape.hidden,)
    linears = [(shape.hidden, (query, kv, kv)), (query, out), (shape.hidden, inner * 2), (*inner, out)]
    weights = sum(len(widths) * fan_in + sum(widths) for fan_in, widths in linears) * RANK
    activations = sum(fan_in + 2 * sum(widths) for fan_in, widths in linears) * tokens
    size = 2 * (weights * min(rows, ADAPTERS) + activations)

    def factors(fan_in: int, widths: tuple[int, ...]) -> SlotFactors:
        a = setting.randn(ADAPTERS * len(widths) * RANK, fan_in, scale=fan_in**-0.5)
        return SlotFactors(a, setting.randn(ADAPTERS * RANK, sum(widths), scale=0.1), widths)

    layers = copies(lambda: [factors(*linear) for linear in linears], size)
    xs = [setting.randn(tokens, fan_in) for fan_in, _ in linears]
    ys = [setting.randn(tokens, sum(widths)) for _, widths in linears]
    token_rows, row_slots = torch.arange(tokens, device=device) * rows // tokens, torch.arange(rows, device=device)
    mix = (token_rows, row_slots[:, None] % ADAPTERS, torch.ones(rows, 1, device=device))
    ranks = torch.full((ADAPTERS,), RANK, device=device)
    batch = grouped_lora([one for layer in layers for one in layer], RANK, ranks, *mix) if runs_triton(device) else None

    def add(layer: int, to: list[Tensor]) -> None:
        for i, (x, y) in enumerate(zip(xs, to, strict=True)):
            if batch is None:  # a CPU has the reference alone
                grouped_lora_ref(x, y, layers[layer][i], *mix, ranks)
            else:
                batch.update(layer * len(linears) + i, x).add_to(y)

    def error() -> float:
        mine, want = [y.clone() for y in ys], [y.float() for y in ys]
        add(0, mine)
        for x, y, (a, b, widths) in zip(xs, want, layers[0], strict=True):
            grouped_lora_ref(x.float(), y, SlotFactors(a.float(), b.float(), widths), *mix, ranks)
        return max(map(relative, mine, want))

    calls = [partial(add, layer, ys) for layer in range(len(layers))]
    return Case(f"a layer, {count(tokens, 'token')}, {count(min(rows, ADAPTERS), 'adapter')}", calls, size, error)
