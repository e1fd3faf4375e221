"""A LoRA in host memory, ready to be copied to a device slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specserve_adapters.spec import LinearSpec, ModuleKey

Factors = Mapping[ModuleKey, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class HostAdapter:
    """One adapter's matrices in one contiguous blob (page-locked if asked for).

    `factors[layer, module, expert]` are views (A [rank, in_features], B [out_features, rank]) into `blob` (1-D, the
    model's dtype); the scaling alpha / r is folded into B. `rank` is the largest rank among them. `payload` [bytes]
    uint8 is what travels to a device in one copy: where each module lies in the blob, then the blob; `unpack` takes it
    apart there. Empty where adapters stay on the host.
    """

    blob: Tensor
    factors: Factors
    rank: int
    payload: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    @property
    def num_bytes(self) -> int:
        return self.blob.numel() * self.blob.element_size()


def num_modules(specs: Sequence[LinearSpec]) -> int:
    """Parts of all linears: the modules that may carry a LoRA."""
    return sum(len(spec.parts) for spec in specs)


def round_up(number: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-number // multiple) * multiple


def head_bytes(modules: int) -> int:
    """Bytes of a payload before its blob, which then begins at a multiple of 256."""
    return round_up(modules * 3 * 8, 256)


def unpack(payload: Tensor, modules: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(places [modules, 3] int64 as `specserve_kernels.lora.load` reads them, blob): views of a payload, anywhere."""
    head = head_bytes(modules)
    return payload[: modules * 3 * 8].view(torch.int64).view(modules, 3), payload[head:].view(dtype)


def write_places(payload: Tensor, specs: Sequence[LinearSpec], blob: Tensor, factors: Factors) -> None:
    """Fill the head of `payload`: element of `blob` of each module's A and B, and its rank, in the order of `specs`."""
    rows: list[tuple[int, int, int]] = []
    start = int(blob.storage_offset())
    for key in (key for spec in specs for key in spec.keys):
        if key not in factors:
            rows.append((0, 0, 0))
            continue
        a, b = factors[key]
        rows.append((int(a.storage_offset()) - start, int(b.storage_offset()) - start, int(a.shape[0])))
    payload[: len(rows) * 3 * 8].view(torch.int64).copy_(torch.tensor(rows, dtype=torch.int64).flatten())
