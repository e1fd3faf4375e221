"""LoRA of a mixed batch on a GPU, replayable in a CUDA graph while its rows' adapters change.

    y[t] += Σ_j row_weights[row, j] · B_slot (A_slot x[t])        row = token_rows[t], slot = row_slots[row, j]

for each part of a merged linear, which has its own A and its own columns of y. Which blocks of ranks the tokens use is
worked out once a forward (`lora_tiles`). Each linear then takes a launch of its own, `shrink`; where A lies behind its
weights, whose product gives x Aᵀ of all slots along with its output, a smaller one or none (`gather`). The second
product is added by the kernel that reads the linear's output. Products of few tokens do both halves themselves
(`fold`). But for the product of A behind W, only the real ranks of the slots in use are read. Everything that changes
from step to step lies on the device, launches depend on shapes alone. Products are summed in float32; the shrunk
activations are rounded to the model's dtype for the second product where it has float32's range, and to TF32 for
float16, which has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.activation import silu_mul
from specserve_kernels.language import cdiv, power_of_2, tl
from specserve_kernels.lora.expand import MAX_PARTS, add_kernel, rotate_kernel, silu_kernel
from specserve_kernels.lora.folded import MOST_FOLDED, Folded
from specserve_kernels.lora.gather import gather_shrunk
from specserve_kernels.lora.shrink import arrivals_of, shrink, shrink_cut
from specserve_kernels.lora.tiles import RANK_BLOCK, LoraTiles, block_weights, lora_tiles
from specserve_kernels.overlap import overlaps
from specserve_kernels.qkv import HeadWeights

_FACTORS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}
_SOME_TOKENS = 1024
_PROGRAMS = 396  # three a multiprocessor, as far as registers go
FEWEST_SPLIT = MOST_FOLDED + 1
"""Tokens from which on products give s along with their output. Fewer are folded, or read A alone faster."""
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


class SlotFactors(NamedTuple):
    """One merged linear in all slots: a [S * P * R, in_features]; b [S * R, out_features]; the parts' widths [P].

    R is a multiple of 16. Part p of slot s owns the rows (s * P + p) * R … of a; row s * R + r of b is rank r of slot s
    over the columns of all parts, side by side. From an adapter's rank to the next multiple of 16 rows are zero; what
    lies beyond is never read.
    """

    a: Tensor
    b: Tensor
    widths: tuple[int, ...]


def grouped_lora_ref(
    x: Tensor, y: Tensor, factors: SlotFactors, token_rows: Tensor, row_slots: Tensor, row_weights: Tensor,
    slot_ranks: Tensor,
) -> Tensor:  # fmt: skip
    """The formula above, slot by slot in torch, in place: returns y. What reads y has its own reference."""
    a, b, widths = factors
    ranks, parts, stride = slot_ranks.tolist(), len(widths), b.shape[0] // slot_ranks.shape[0]
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = y.to(precision)
    slots, weights = row_slots[token_rows.clamp(min=0)], row_weights[token_rows.clamp(min=0)].to(precision)
    slots = slots.masked_fill(token_rows[:, None] < 0, -1)
    for slot in [slot for slot, rank in enumerate(ranks) if rank > 0]:
        tokens = (slots == slot).any(dim=1).nonzero().flatten()
        weight = (weights * (slots == slot)).sum(dim=1)[tokens, None]
        column = 0
        for part, width in enumerate(widths):
            first = (slot * parts + part) * stride
            shrunk = x[tokens].to(precision) @ a[first : first + ranks[slot]].to(precision).t() * weight
            b_part = b[slot * stride : slot * stride + ranks[slot], column : column + width]
            total[tokens, column : column + width] += shrunk @ b_part.to(precision)
            column += width
    return y.copy_(total)


@dataclass(frozen=True, slots=True, eq=False)
class Shrunk:
    """The first half of a linear's adapters, for whoever reads the linear's output, once.

    s `lies` "dense" [N, parts, tile, K] or "compact" [N * tile, M, parts, R], as `shrink` or `gather` leaves it, or
    "behind" [T, S * parts * R], see `expand`; `b`, whose R is `rank_stride`, and `widths` as in SlotFactors. `tiles`
    was there before the kernels of this linear began, s is to be waited for (see overlap).
    """

    s: Tensor
    lies: str
    parts: int
    rank_stride: int
    b: Tensor
    widths: tuple[int, ...]
    tiles: LoraTiles
    num_tokens: int
    dtype: torch.dtype
    many: bool  # rank blocks are expected, as GroupedLora says
    weights: Tensor | None = None  # of s that lies behind: see block_weights

    def add_to(self, y: Tensor, product: Tensor | None = None) -> None:
        """y [T, out_features] += Δ, in place, and `product` of the same shape if it is given."""
        assert y.shape == (self.num_tokens, self.b.shape[1]) and y.stride(1) == 1, (y.shape, y.stride(), self.b.shape)
        assert y.dtype == self.dtype and self.num_tokens * y.stride(0) < 2**31, (y.dtype, y.stride())
        assert product is None or (product.shape == y.shape and product.stride(1) == 1), product.shape
        columns, loops, constants = _column_constants(self._traits(overlaps(y)), self.b.shape[1])
        tiles, widths = self.tiles, (*self.widths, 0, 0, 0)[:MAX_PARTS]
        blocks = sum([-(-width // (columns * loops)) for width in self.widths])
        add_kernel[(blocks, tiles.blocks.shape[0])](
            y, product, self.b, self.s, tiles.token_slots, self.weights, tiles.counts, tiles.blocks,
            *widths, self.num_tokens, tiles.blocks.shape[1], self.rank_stride, self.s.stride(-2),
            self.b.shape[1], y.stride(0), 0 if product is None else product.stride(0), loops, **constants,
        )  # fmt: skip

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate_up [T, 2 * n] + Δ → [T, n]; see activation."""
        tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.stride(1) == 1 and gate_up.dtype == self.dtype, (gate_up.stride(), gate_up.dtype)
        assert self.widths in ((size, size), (2 * size,)) and tokens == self.num_tokens, (self.widths, gate_up.shape)
        if size % RANK_BLOCK:  # no model's; on a GPU the kernel below was seen to be wrong there
            self.add_to(gate_up)
            return silu_mul(gate_up)
        out = gate_up.new_empty(tokens, size)
        columns, loops, constants = _column_constants(self._traits(overlaps(gate_up)), size)
        tiles = self.tiles
        silu_kernel[(-(-size // (columns * loops)), tiles.blocks.shape[0])](
            gate_up, self.b, self.s, out, tiles.token_slots, self.weights, tiles.counts, tiles.blocks,
            size, tokens, tiles.blocks.shape[1], self.rank_stride, self.s.stride(-2), self.b.shape[1],
            gate_up.stride(0), loops, **constants,
        )  # fmt: skip
        return out

    def rotate_and_cache(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
        *, heads: int, norm: HeadWeights | None, finite: bool,
    ) -> Tensor:  # fmt: skip
        """qkv.rotate_and_cache of qkv + Δ."""
        tokens, (_, kv_heads, head_dim) = qkv.shape[0], k_cache.shape
        assert qkv.stride(1) == 1 and qkv.dtype == cos.dtype == self.dtype, (qkv.stride(), qkv.dtype, cos.dtype)
        assert tokens == self.num_tokens and qkv.shape[1] == self.b.shape[1], (qkv.shape, self.b.shape)
        q = qkv.new_empty(tokens, heads, head_dim)
        loops, constants = _rotate_constants(self._traits(overlaps(qkv)), heads, kv_heads, head_dim, self.widths)
        tiles, widths = self.tiles, (*self.widths, 0, 0)[:3]
        weight, eps = norm or (None, None)
        rotate_kernel[((heads + 2 * kv_heads) // loops, tiles.blocks.shape[0])](
            qkv, self.b, self.s, tiles.token_slots, self.weights, tiles.counts, tiles.blocks,
            cos, sin, weight, eps, slot_mapping, q, k_cache, v_cache,
            *widths, tokens, tiles.blocks.shape[1], self.rank_stride, self.s.stride(-2),
            self.b.shape[1], qkv.stride(0), k_cache.stride(0), v_cache.stride(0), FINITE=finite, **constants,
        )  # fmt: skip
        return q

    def _traits(self, pdl: bool) -> _Traits:
        tiles = self.tiles
        return _Traits(
            tiles.blocks.shape[0], tiles.token_slots.shape[1], tiles.tile, self.parts, self.lies, self.rank_stride,
            self.dtype, self.many or self.num_tokens <= _SOME_TOKENS, pdl,
        )  # fmt: skip


class _Traits(NamedTuple):
    """What the constants of a second half depend on: of the tokens, only how many tiles they are."""

    num_tiles: int
    per_row: int
    tile: int
    parts: int
    lies: str
    rank_stride: int
    dtype: torch.dtype
    mixed: bool  # a tile of decodes, with an adapter each, may be what takes longest
    pdl: bool


def _common_constants(traits: _Traits, most_ranks: int) -> dict[str, object]:
    """Ranks at once: a prompt's tile seldom has more than one adapter's; where it does it has many, of decodes, which
    take more at once as far as there are registers."""
    factor = _FACTORS[traits.dtype]
    most = 64 if traits.lies == "dense" else min(most_ranks, power_of_2(traits.rank_stride))
    ranks = min(most, 32) if factor == tl.float32 else most
    wide = ranks if factor == tl.float32 or not traits.mixed else max(ranks, most_ranks)
    if traits.lies == "behind":  # weighing takes registers, and fewer programs at once cost more than further loops
        ranks = wide = 16
    registers: dict[str, object] = {"maxnreg": 168} if traits.lies == "behind" and traits.pdl else {}
    return registers | {
        "M": traits.per_row, "TILE": traits.tile, "PARTS": traits.parts, "LIES": traits.lies,
        "RANKS": ranks, "WIDE": wide, "FACTOR": factor,
        "PRECISION": _PRECISIONS[traits.dtype], "PDL": traits.pdl, "num_warps": 4, "launch_pdl": traits.pdl,
    }  # fmt: skip


@lru_cache(maxsize=1024)
def _column_constants(traits: _Traits, width: int) -> tuple[int, int, Mapping[str, object]]:
    """(columns at once, how often in a program, the kernel's constants) for `width` columns of results."""
    columns, loops = 64, 4 if traits.lies == "compact" and not traits.mixed else 1
    if traits.lies == "behind":
        loops = _loops(cdiv(width, columns), traits.num_tiles)
    return columns, loops, _common_constants(traits, 64) | {"COLUMNS": columns}


def _loops(blocks: int, tiles: int) -> int:
    """How many blocks of columns a program takes of a tile that has so many, if all tiles take as long: a program costs
    about a block more than its blocks, and programs come in rounds of as many as the device holds at once."""
    rounds = {loops: cdiv(cdiv(blocks, loops) * tiles, _PROGRAMS) for loops in range(1, blocks + 1)}
    return min(rounds, key=lambda loops: rounds[loops] * (loops + 1))


@lru_cache(maxsize=1024)
def _rotate_constants(
    traits: _Traits, heads: int, kv_heads: int, head_dim: int, widths: tuple[int, ...]
) -> tuple[int, Mapping[str, object]]:
    """(heads of a program, which are all of one part; the kernel's constants)."""
    assert len(widths) <= 3 and not any(width % head_dim for width in widths), (widths, head_dim)
    loops = 4 if traits.lies == "compact" and not traits.mixed else 1
    while any(number % loops for number in (kv_heads, *[width // head_dim for width in widths])):
        loops //= 2
    block = max(16, power_of_2(head_dim // 2))
    own = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": head_dim, "BLOCK": block, "LOOPS": loops}
    return loops, _common_constants(traits, 32) | own


@dataclass(frozen=True, slots=True, eq=False)
class GroupedLora:
    """The adapters of one forward's tokens, used by every linear of the model. `tiles` is as old as this object."""

    linears: Sequence[SlotFactors]
    rank_stride: int
    tiles: LoraTiles
    num_tokens: int
    many: bool  # rank blocks are expected: of few tokens as Folded says, else of tiles of several requests' tokens
    counters: Tensor  # zeros: `ready` of each linear for `fold`, then the arrivals of either
    whole: LoraTiles | None  # all tokens in one tile, where they are few
    weights: Tensor | None = None  # of the tiles' blocks, where products may give s along with their output
    gathers: bool = False  # whether `split` gathers s, rather than leave it behind the output

    @property
    def foldable(self) -> bool:
        """Whether there are so few tokens that products may add adapters themselves."""
        return self.whole is not None

    def fold(self, linear_index: int, x: Tensor) -> Folded:
        """What the product of linear `linear_index` takes to add its adapters itself, once a forward."""
        a, b, widths = self.linears[linear_index]
        assert x.shape == (self.num_tokens, a.shape[1]) and x.dtype == a.dtype, (x.shape, x.dtype, a.shape)
        assert self.whole is not None, self.num_tokens
        ready, arrivals = self.counters[linear_index : linear_index + 1], self.counters[len(self.linears) :]
        return Folded(a, b, widths, self.rank_stride, self.whole, self.many, arrivals, ready)

    def update(self, linear_index: int, x: Tensor) -> Shrunk:
        """What the adapters add to linear `linear_index` of x [T, in_features]: its first half, of x as it is now."""
        a, _, widths = self.linears[linear_index]
        assert x.shape == (self.num_tokens, a.shape[1]) and x.stride(1) == 1, (x.shape, x.stride(), a.shape)
        assert x.dtype == a.dtype, x.dtype
        tiles, parts = self.tiles, len(widths)
        cut = shrink_cut(
            *x.shape, parts, tiles.token_slots.shape[1], tiles.blocks.shape[1], self.rank_stride, x.dtype, overlaps(x)
        )
        s = shrink(x, a, self.rank_stride, tiles, self.counters[len(self.linears) :], cut)
        return self._shrunk(linear_index, s, "dense" if cut.dense else "compact")

    @property
    def splits(self) -> bool:
        """Whether `split` is for these tokens: so many that most of their time is a product's."""
        return self.weights is not None

    def split(self, linear_index: int, y: Tensor) -> tuple[Tensor, Shrunk]:
        """y [T, out_features + S * P * R], of a product whose weights have `a` of linear `linear_index` behind them:
        the output [T, out_features], rows apart, and the first half of its adapters."""
        a, b, widths = self.linears[linear_index]
        assert self.weights is not None, self.num_tokens
        assert y.shape == (self.num_tokens, b.shape[1] + a.shape[0]) and y.dtype == a.dtype, (y.shape, y.dtype, a.dtype)
        output, s = y.split_with_sizes((b.shape[1], a.shape[0]), 1)
        if not self.gathers:
            return output, self._shrunk(linear_index, s, "behind")
        s = gather_shrunk(s, len(widths), self.rank_stride, self.tiles, self.weights)
        return output, self._shrunk(linear_index, s, "dense")

    def _shrunk(self, linear_index: int, s: Tensor, lies: str) -> Shrunk:
        a, b, widths = self.linears[linear_index]
        return Shrunk(
            s, lies, len(widths), self.rank_stride, b, widths, self.tiles, self.num_tokens, a.dtype, self.many,
            self.weights if lies == "behind" else None,
        )  # fmt: skip


def grouped_lora(
    linears: Sequence[SlotFactors], max_rank: int, slot_ranks: Tensor,
    token_rows: Tensor, row_slots: Tensor, row_weights: Tensor, *, many: bool = False, behind: bool = False,
    max_query_len: int | None = None,
) -> GroupedLora:  # fmt: skip
    """What T = len(token_rows) tokens use: part of every forward, inside the captured graph.

    slot_ranks [S] int64, 0 for an empty slot, none above max_rank; the others as in `lora_tiles`. `behind`: some linear
    has its A behind its weights. `max_query_len`: no row has more tokens (None: any number). `many`: what to expect,
    see GroupedLora; right either way.
    """
    inputs, num_tokens = (token_rows, row_slots, row_weights, slot_ranks, max_rank), token_rows.shape[0]
    tiles = lora_tiles(*inputs)
    whole = tiles if tiles.counts.shape[0] == 1 else None
    if whole is None and num_tokens <= MOST_FOLDED:
        whole = lora_tiles(*inputs, tile=MOST_FOLDED)
    arrivals = max(arrivals_of(t.blocks.shape[0], MAX_PARTS, t.blocks.shape[1]) for t in (tiles, whole or tiles))
    counters = tiles.blocks.new_zeros(len(linears) + arrivals)
    stride = cdiv(max_rank, RANK_BLOCK) * RANK_BLOCK
    weights = block_weights(tiles) if behind and num_tokens >= FEWEST_SPLIT else None
    gathers = many or (max_query_len is not None and max_query_len < tiles.tile)
    return GroupedLora(linears, stride, tiles, num_tokens, many, counters, whole, weights, gathers)
