"""Rotary positions and the cache's writes: reads the merged product, writes queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.qkv import rotate_and_cache, rotate_and_cache_ref


def cases(setting: Setting) -> Iterator[Case]:
    for tokens in (*setting.rows, setting.prompt):
        yield case(setting, tokens)
    yield case(setting, setting.prompt, normed=True)


def case(setting: Setting, tokens: int, normed: bool = False) -> Case:
    shape, device = setting.shape, setting.device
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    size = 2 * 2 * tokens * (width + shape.head_dim)
    norm = (setting.randn(shape.heads + shape.kv_heads, shape.head_dim), torch.tensor(1e-6, device=device))
    angle = torch.rand(tokens, 1, shape.head_dim // 2, device=device) * 6.28
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)

    def buffers() -> tuple[Tensor, ...]:
        cache = (tokens, shape.kv_heads, shape.head_dim)
        slots = torch.randperm(tokens, device=device)
        qkv, rotation = setting.randn(tokens, width), (cos.bfloat16(), sin.bfloat16())
        return qkv, *rotation, setting.randn(*cache), setting.randn(*cache), slots

    sets = copies(buffers, size)
    run = partial(rotate_and_cache, heads=shape.heads, norm=norm if normed else None, finite=False)

    def error() -> float:
        mine = [tensor.clone() for tensor in sets[0]]
        wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in sets[0]]
        wide_norm = (norm[0].float(), norm[1]) if normed else None
        queries = run(*mine)
        want = rotate_and_cache_ref(*wide, heads=shape.heads, norm=wide_norm, finite=False)
        return max(relative(queries, want), relative(mine[3], wide[3]), relative(mine[4], wide[4]))

    name = f"{count(tokens, 'token')}{', heads normed' if normed else ''}"
    return Case(name, [partial(run, *one) for one in sets], size, error)
