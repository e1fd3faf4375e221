"""LoRA of a mixed batch on a GPU, replayable in a CUDA graph while its rows' adapters change.

    y[t] += Σ_j row_weights[row, j] · B_slot (A_slot x[t])        row = token_rows[t], slot = row_slots[row, j]

for each part of a merged linear, which has its own A and its own columns of y. Tokens are grouped once a forward
(`lora_tiles`), then each linear takes two launches: `lora_shrink` and `lora_expand`. Both read only the real ranks of
the slots in use, and each adapter once per tile of tokens that share it. Everything that changes from step to step lies
on the device, launches depend on shapes alone. Products are summed in float32; the shrunk activations are rounded to
the model's dtype for the second product where it has float32's range, and to TF32 for float16, which has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import tl, triton
from specserve_kernels.lora.expand import MAX_PARTS, expand_kernel
from specserve_kernels.lora.shrink import shrink_kernel
from specserve_kernels.lora.tiles import LoraTiles, lora_tiles

_FEW_TOKENS = 512
_FACTORS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float32, torch.float32: tl.float32}
_PRECISIONS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


class SlotFactors(NamedTuple):
    """One merged linear in all slots: a [S * P * R, in_features]; b [S, R * out_features]; the parts' widths [P].

    Part p of slot s owns the rows (s * P + p) * R … of a, and of row s of b, behind R * (widths before p), the elements
    of its Bᵀ [R, width_p]. What lies beyond a slot's rank is never read.
    """

    a: Tensor
    b: Tensor
    widths: tuple[int, ...]


class ShrinkShape(NamedTuple):
    """How the first product is cut: `splits` (a power of 2) of `split` features, `depth` at a time, and `ranks`."""

    ranks: int
    depth: int
    split: int
    splits: int
    stages: int


def grouped_lora_ref(
    x: Tensor, y: Tensor, factors: SlotFactors, token_rows: Tensor, row_slots: Tensor, row_weights: Tensor,
    slot_ranks: Tensor,
) -> Tensor:  # fmt: skip
    """The formula above, slot by slot in torch, in place: returns y."""
    a, b, widths = factors
    ranks, parts, max_rank = slot_ranks.tolist(), len(widths), b.shape[1] // sum(widths)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = y.to(precision)
    slots, weights = row_slots[token_rows.clamp(min=0)], row_weights[token_rows.clamp(min=0)].to(precision)
    slots = slots.masked_fill(token_rows[:, None] < 0, -1)
    for slot in [slot for slot, rank in enumerate(ranks) if rank > 0]:
        tokens = (slots == slot).any(dim=1).nonzero().flatten()
        weight = (weights * (slots == slot)).sum(dim=1)[tokens, None]
        column = 0
        for part, width in enumerate(widths):
            first = (slot * parts + part) * max_rank
            shrunk = x[tokens].to(precision) @ a[first : first + ranks[slot]].to(precision).t() * weight
            b_part = b[slot, column * max_rank : (column + width) * max_rank].view(max_rank, width)[: ranks[slot]]
            total[tokens, column : column + width] += shrunk @ b_part.to(precision)
            column += width
    return y.copy_(total)


def shrink_shape(num_tokens: int, in_features: int, max_rank: int, dtype: torch.dtype) -> ShrinkShape:
    """Few tokens: enough splits to fill the device, but `expand` reads every one of them."""
    few = num_tokens <= _FEW_TOKENS
    ranks = min(32 if few else 64, max(16, triton.next_power_of_2(max_rank)))
    depth = 32 if dtype == torch.float32 else 128 if few else 64
    most, least = (8, 256) if few else (4, 1024) if num_tokens <= 2048 else (2, 2048)
    splits = 1 << max(0, min(most, in_features // least).bit_length() - 1)
    return ShrinkShape(ranks, depth, _round_up(triton.cdiv(in_features, splits), depth), splits, 4)


def expand_shape(num_tokens: int) -> tuple[int, int]:
    """(columns of y that a program takes, its warps)."""
    return (128, 4) if num_tokens <= _FEW_TOKENS else (128, 8)


@dataclass(frozen=True, slots=True, eq=False)
class GroupedLora:
    """The adapters of one forward's tokens, used by every linear of the model. `tiles` is as old as this object.

    `shrink` needs only x: it may run beside the base's product, on another stream. `expand` reads the tiles before the
    kernel in front of it has ended, which must be that `shrink` or come after it. Both halves use `workspace` [n]
    float32, so one linear's `expand` must precede the next one's `shrink`.
    """

    linears: Sequence[SlotFactors]
    max_rank: int
    tiles: LoraTiles
    num_tokens: int
    workspace: Tensor

    def apply(self, linear_index: int, x: Tensor, y: Tensor) -> None:
        """y += the adapters' product of linear `linear_index`, in place. x [T, in_features], y [T, out_features]."""
        self.shrink(linear_index, x)
        self.expand(linear_index, y)

    def shrink(self, linear_index: int, x: Tensor) -> None:
        """x [T, in_features] → the workspace."""
        factors = self.linears[linear_index]
        assert x.shape == (self.num_tokens, factors.a.shape[1]), (x.shape, self.num_tokens, factors.a.shape)
        assert x.stride(1) == 1, x.stride()
        assert x.dtype == factors.a.dtype, x.dtype
        shape = shrink_shape(*x.shape, self.max_rank, x.dtype)
        tiles, parts = self.tiles, len(factors.widths)
        grid = (parts * triton.cdiv(self.max_rank, shape.ranks), shape.splits, tiles.tile_codes.shape[0])
        shrink_kernel[grid](
            x, factors.a, self.workspace, tiles.tile_codes, tiles.tokens, tiles.codes, tiles.weights,
            x.shape[1], self.max_rank, x.stride(0), self._split_stride(parts, shape), parts, shape.split,
            **_columns(tiles), TILE=tiles.tile, RANKS=shape.ranks, DEPTH=shape.depth,
            STAGES=shape.stages, PRECISION=_PRECISIONS[x.dtype], num_warps=4, **_dependent(x),
        )  # fmt: skip

    def expand(self, linear_index: int, y: Tensor) -> None:
        """y [T, out_features] += what the workspace holds for this linear, in place."""
        factors = self.linears[linear_index]
        assert y.shape == (self.num_tokens, sum(factors.widths)), (y.shape, self.num_tokens, factors.widths)
        assert y.stride(1) == 1, y.stride()
        assert y.dtype == factors.b.dtype, y.dtype
        assert self.num_tokens * y.stride(0) < 2**31, "offsets into y have 32 bits"
        shape = shrink_shape(self.num_tokens, factors.a.shape[1], self.max_rank, y.dtype)
        tiles, parts = self.tiles, len(factors.widths)
        columns, warps = expand_shape(self.num_tokens)
        blocks = sum(triton.cdiv(width, columns) for width in factors.widths)
        expand_kernel[(blocks, tiles.tile_codes.shape[0])](
            y, factors.b, self.workspace, tiles.tile_codes, tiles.tokens, tiles.codes,
            *factors.widths, *[0] * (MAX_PARTS - parts), parts,
            y.shape[1], self.max_rank, y.stride(0), self._split_stride(parts, shape),
            **_columns(tiles), TILE=tiles.tile, RANKS=shape.ranks, COLUMNS=columns,
            SPLITS=shape.splits, FACTOR=_FACTORS[y.dtype], PRECISION=_PRECISIONS[y.dtype],
            num_warps=warps, **_dependent(y),
        )  # fmt: skip

    def _split_stride(self, parts: int, shape: ShrinkShape) -> int:
        return self.tiles.codes.numel() * parts * _round_up(self.max_rank, shape.ranks)


def grouped_lora(
    linears: Sequence[SlotFactors], max_rank: int, slot_ranks: Tensor,
    token_rows: Tensor, row_slots: Tensor, row_weights: Tensor,
) -> GroupedLora:  # fmt: skip
    """Group T = len(token_rows) tokens and reserve the workspace: part of every forward, inside the captured graph.

    slot_ranks [S] int64, 0 for an empty slot; the others as in `lora_tiles`.
    """
    assert all(len(linear.widths) <= MAX_PARTS for linear in linears)
    num_tokens = token_rows.shape[0]
    tiles = lora_tiles(token_rows, row_slots, row_weights, slot_ranks, 16 if num_tokens <= _FEW_TOKENS else 64)
    shapes = [(shrink_shape(num_tokens, a.shape[1], max_rank, a.dtype), len(widths)) for a, _, widths in linears]
    columns = max(shape.splits * parts * _round_up(max_rank, shape.ranks) for shape, parts in shapes)
    workspace = torch.empty(tiles.codes.numel() * columns, dtype=torch.float32, device=token_rows.device)
    return GroupedLora(linears, max_rank, tiles, num_tokens, workspace)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _columns(tiles: LoraTiles) -> dict[str, int]:
    per_row = tiles.codes.shape[1]
    return {"M": per_row, "MP": triton.next_power_of_2(per_row)}


def _dependent(tensor: Tensor) -> dict[str, bool]:
    """On a GPU each kernel starts while the one before it ends and waits for it where it needs its results."""
    return {"DEPENDENT": True, "launch_pdl": True} if tensor.is_cuda else {"DEPENDENT": False}
