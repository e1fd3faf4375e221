"""SwiGLU's gate: reads gates and ups, writes half as much."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.activation import silu_mul, silu_mul_ref


def cases(setting: Setting) -> Iterator[Case]:
    for tokens in (*setting.rows, setting.prompt):
        yield case(setting, tokens)


def case(setting: Setting, tokens: int) -> Case:
    width = setting.shape.intermediate
    size = 2 * 3 * tokens * width
    both = copies(lambda: setting.randn(tokens, 2 * width), size)

    def error() -> float:
        return relative(silu_mul(both[0]), silu_mul_ref(both[0].float()))

    return Case(count(tokens, "token"), [partial(silu_mul, one) for one in both], size, error)
