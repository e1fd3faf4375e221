"""What attention is told of a forward, and what every backend of it provides.

A backend is a module (or any object) with the three functions of `AttentionBackend`; `backends` names them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specserve_kernels.qkv import HeadWeights

SHORT_QUERY = 16
"""Sequences with at most this many queries (decodes, verifications) are computed together, longer ones as prefills."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the T tokens of one forward stand; B sequences, whose tokens follow one another in the batch.

    A sequence's KV length is the position of its last token plus one. What differs between two replays of one graph is
    on the device; the host's numbers are the shapes, and bounds.

    Ragged metadata (query_lens None; Triton's backend alone takes it) leaves lengths to the device as well: sequences
    may be empty, and the tokens from query_start[B] on belong to none. Their attention is 0.
    """

    positions: Tensor  # [T] int64, true positions; padding tokens have position 0 and slot 0
    slot_mapping: Tensor  # [T] int64 into the flattened cache; in block 0 for padding
    block_tables: Tensor  # [R, max_blocks] int64, the tables of all device rows
    rows: Tensor  # [B] int64, the row of block_tables that each sequence reads
    query_start: Tensor  # [B + 1] int64, the first token of each sequence, then T
    query_lens: tuple[int, ...] | None  # host, per sequence, each >= 1; sum = T
    context_bounds: tuple[int, ...]  # host upper bound of KV length per sequence after this forward
    block_size: int
    max_query_len: int = 0  # host upper bound of a sequence's tokens where query_lens is None


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What is the same in all layers of a model; `heads` = groups * `kv_heads`."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Rotation(NamedTuple):
    """How raw qkv becomes queries, and keys and values in the caches: arguments of `qkv.rotate_and_cache`."""

    cos: Tensor  # [T, 1, head_dim]
    sin: Tensor  # [T, 1, head_dim], signed
    slot_mapping: Tensor  # [T] int64
    norm: HeadWeights | None
    finite: bool


class AttentionBackend(Protocol):
    """One way to compute attention over pages. What `prepare` returns is the backend's own business."""

    def takes(self, shape: AttentionShape, block_size: int) -> bool:
        """Whether it can compute this, on a device where it runs at all."""

    def prepare(self, meta: AttentionMetadata, shape: AttentionShape) -> Any:
        """Compute once what all layers of one forward share."""

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Any, scale: float, window: int | None
    ) -> Tensor:
        """q [T, heads, head_dim] → [T, heads, head_dim], as `attention.paged_attention` says."""

    def takes_qkv(self, prepared: Any) -> bool:
        """Whether `attend_qkv` computes this forward in fewer kernels than rotate_and_cache and `attend` take."""

    def attend_qkv(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, prepared: Any, rotation: Rotation, scale: float,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        """`qkv.rotate_and_cache`, then `attend`; where takes_qkv."""
