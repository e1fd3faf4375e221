"""A layer's four products of many tokens with what reads them, attention left out: without adapters, and with them by
each of the ways to x·Aᵀ: from a kernel of its own, behind the weights and read there, behind them and gathered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, relative
from specserve_kernels.activation import silu_mul, silu_mul_ref
from specserve_kernels.dispatch import runs_triton
from specserve_kernels.lora.grouped import GroupedLora, Shrunk, SlotFactors, grouped_lora, grouped_lora_ref
from specserve_kernels.qkv import rotate_and_cache, rotate_and_cache_ref

SLOTS, RANK = 8, 16
LOADS = ((160, 5), (256, 2), (640, 5), (512, 512), (1024, 512), (2048, 512), (8192, 512))  # tokens, and a request's
WAYS = ("none", "apart", "behind", "gathered")


def cases(setting: Setting) -> Iterator[Case]:
    on_gpu = runs_triton(setting.device)
    for tokens, each in LOADS if on_gpu else ((setting.prompt, 5),):
        load = Load(setting, tokens, each)
        for way in WAYS if on_gpu else ("none", "apart"):
            calls = [partial(load.layer, index, way) for index in range(len(load.layers))]
            name = f"{count(tokens, 'token')}, {count(each, 'token')} a request, {way}"
            yield Case(name, calls, load.bytes, partial(load.error, way), load.flops)


@dataclass(frozen=True)
class Load:
    """Requests of `each` tokens take the adapters in turn."""

    setting: Setting
    tokens: int
    each: int

    @property
    def shapes(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each linear's in_features and its parts' widths: q, k, v; output; gate and up; down."""
        shape = self.setting.shape
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        inner, out = shape.intermediate, (shape.hidden,)
        return [(shape.hidden, (query, kv, kv)), (query, out), (shape.hidden, (inner, inner)), (inner, out)]

    @property
    def bytes(self) -> float:
        """Weights once, and each input and output."""
        return 2.0 * sum(fan_in * sum(widths) + self.tokens * (fan_in + sum(widths)) for fan_in, widths in self.shapes)

    @property
    def flops(self) -> float:
        return 2.0 * self.tokens * sum(fan_in * sum(widths) for fan_in, widths in self.shapes)

    @cached_property
    def layers(self) -> list[list[tuple[Tensor, SlotFactors]]]:
        """Of each layer and linear: W with A behind it [out + S * P * R, in], and the factors."""
        return copies(lambda: [self._linear(*one) for one in self.shapes], self.bytes)

    def _linear(self, fan_in: int, widths: tuple[int, ...]) -> tuple[Tensor, SlotFactors]:
        out = sum(widths)
        both = self.setting.randn(out + SLOTS * len(widths) * RANK, fan_in, scale=fan_in**-0.5)
        return both, SlotFactors(both[out:], self.setting.randn(SLOTS * RANK, out, scale=0.3 * RANK**-0.5), widths)

    @cached_property
    def xs(self) -> list[Tensor]:
        return [self.setting.randn(self.tokens, fan_in) for fan_in, _ in self.shapes]

    @cached_property
    def mix(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the tokens; slots and weights of the rows."""
        device, rows = self.setting.device, -(-self.tokens // self.each)
        slots = torch.arange(rows, device=device)[:, None] % SLOTS
        return torch.arange(self.tokens, device=device) // self.each, slots, torch.ones(rows, 1, device=device)

    @cached_property
    def ranks(self) -> Tensor:
        return torch.full((SLOTS,), RANK, device=self.setting.device)

    @cached_property
    def batches(self) -> dict[str, GroupedLora]:
        """By way: of all layers' linears, as a forward makes it once."""
        if not runs_triton(self.setting.device):
            return {}
        factors = [factors for layer in self.layers for _, factors in layer]
        return {
            way: grouped_lora(
                factors, RANK, self.ranks, *self.mix, behind=way != "apart",
                max_query_len=1 if way == "gathered" else None,
            )
            for way in WAYS[1:]
        }  # fmt: skip

    def layer(self, index: int, way: str) -> list[Tensor]:
        """What each linear's reader leaves; residuals are 1."""
        batch = self.batches.get(way)
        qkv, o, gate_up, down = range(4)
        y, update = self._product(index, qkv, way, batch)
        rotate = rotate_and_cache if update is None else update.rotate_and_cache
        q = rotate(y, *self._rotation, heads=self.setting.shape.heads, norm=None, finite=True)
        y, update = self._product(index, gate_up, way, batch)
        gated = silu_mul(y) if update is None else update.silu_mul(y)
        return [q, gated, self._added(index, o, way, batch), self._added(index, down, way, batch)]

    def _product(self, index: int, linear: int, way: str, batch: GroupedLora | None) -> tuple[Tensor, Shrunk | None]:
        (both, factors), x = self.layers[index][linear], self.xs[linear]
        if batch is not None and way != "apart":
            return batch.split(4 * index + linear, x @ both.t())
        y = x @ both[: sum(factors.widths)].t()
        if way == "apart" and batch is None:  # a CPU has the reference alone
            grouped_lora_ref(x, y, factors, *self.mix, self.ranks)
        return y, None if batch is None else batch.update(4 * index + linear, x)

    def _added(self, index: int, linear: int, way: str, batch: GroupedLora | None) -> Tensor:
        (both, factors), x = self.layers[index][linear], self.xs[linear]
        residual = torch.ones(self.tokens, sum(factors.widths), device=x.device, dtype=x.dtype)
        weight = both[: sum(factors.widths)].t()
        if way == "none":
            return residual.addmm_(x, weight)
        if batch is None:
            return residual.add_(self._product(index, linear, way, None)[0])
        if way == "apart":
            update = batch.update(4 * index + linear, x)
            residual.addmm_(x, weight)
            update.add_to(residual)
        else:
            product, update = batch.split(4 * index + linear, x @ both.t())
            update.add_to(residual, product)
        return residual

    @cached_property
    def _rotation(self) -> tuple[Tensor, ...]:
        """cos, sin, the caches, the tokens' slots in them."""
        shape, device = self.setting.shape, self.setting.device
        cos = torch.ones(self.tokens, 1, shape.head_dim, device=device, dtype=torch.bfloat16)
        caches = torch.zeros(2, self.tokens, shape.kv_heads, shape.head_dim, device=device, dtype=torch.bfloat16)
        return cos, torch.zeros_like(cos), caches[0], caches[1], torch.arange(self.tokens, device=device)

    def error(self, way: str) -> float:
        return max(map(relative, self.layer(0, way), self._reference(way)))

    def _reference(self, way: str) -> Iterator[Tensor]:
        ys = []
        for (both, factors), x in zip(self.layers[0], self.xs, strict=True):
            y = x.float() @ both[: sum(factors.widths)].float().t()
            if way != "none":
                wide = SlotFactors(factors.a.float(), factors.b.float(), factors.widths)
                grouped_lora_ref(x.float(), y, wide, *self.mix, self.ranks)
            ys.append(y)
        cos, sin, k, v, slots = self._rotation
        heads = self.setting.shape.heads
        wide_rotation = (cos.float(), sin.float(), k.float(), v.float(), slots)
        yield rotate_and_cache_ref(ys[0], *wide_rotation, heads=heads, norm=None, finite=True)
        yield silu_mul_ref(ys[2])
        yield from (1 + ys[1], 1 + ys[3])
