"""What one forward pass is told: where its tokens stand, their KV caches, their adapters, the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specserve_kernels.attention.paged import AttentionMetadata
from specserve_kernels.qkv import HeadWeights


class LoraUpdate(Protocol):
    """What adapters add to the output of one linear, taken in by whoever reads that output first."""

    def add_to(self, y: Tensor) -> None:
        """y [T, out_features] += the update, in place."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """specserve_kernels.activation.silu_mul of gate_up [T, 2 n] plus the update → [T, n]. gate_up is used up."""

    def rotate_and_cache(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
        *, heads: int, norm: HeadWeights | None, finite: bool,
    ) -> Tensor:  # fmt: skip
        """specserve_kernels.qkv.rotate_and_cache of qkv plus the update."""


class LoraApplier(Protocol):
    """The adapters of one step's tokens; built once a step, shared by every linear."""

    def update(self, linear_index: int, x: Tensor) -> LoraUpdate:
        """What the adapters add to linear `linear_index` (index in `model.linears`) of x [T, in_features].

        One at a time: an update must be taken in before the next is asked for. x stays as it is until then.
        """


class Communicator(Protocol):
    """The ranks among which one model is sharded."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum of x over all ranks, the same on each."""


class SingleRank:
    """One rank: nothing to exchange."""

    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x


SINGLE_RANK = SingleRank()


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Arguments of one forward besides the token ids; built by the runner, read by the layers.

    `kv_caches[layer]` = (k, v), each [num_blocks * block_size, num_kv_heads, head_dim], zero when allocated (a
    masked key must be finite). `lora` None: no token of this forward has an adapter.
    """

    attention: AttentionMetadata
    kv_caches: Sequence[tuple[Tensor, Tensor]]
    lora: LoraApplier | None = None
    communicator: Communicator = SINGLE_RANK


@dataclass(frozen=True, slots=True)
class TargetOutputs:
    """What verification reads of a target's forward.

    `logits`: [N, vocab]. `aux_hidden`: [N, n_layers_asked * hidden] for proposers that draft from hidden states,
    else None.
    """

    logits: Tensor
    aux_hidden: Tensor | None = None
