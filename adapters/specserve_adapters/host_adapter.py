"""A LoRA in host memory, ready to be copied to a device slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from specserve_adapters.spec import ModuleKey


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """One adapter's matrices in one contiguous blob (page-locked if asked for).

    `factors[layer, module, expert]` are views (A [rank, in_features], B [out_features, rank]) into `blob` (1-D, the
    model's dtype); the scaling alpha / r is folded into B. `rank` is the largest rank among them.
    """

    blob: Tensor
    factors: Mapping[ModuleKey, tuple[Tensor, Tensor]]
    rank: int

    @property
    def num_bytes(self) -> int:
        return self.blob.numel() * self.blob.element_size()
