"""Which class keeps a linear's weights. A new kind is its file and its line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

import torch

from specserve.layers.quantised import QuantisedStorage
from specserve.layers.storage import DenseStorage, Storage


class NewStorage(Protocol):
    """Allocates a linear's weights; `widths` are the outputs of its parts in merged order, `adapter_rows` how many rows
    the A of all adapter slots has, which may find room behind them."""

    def __call__(
        self, in_features: int, widths: Sequence[int], *, bias: bool, dtype: torch.dtype, device: torch.device,
        adapter_rows: int = 0,
    ) -> Storage: ...  # fmt: skip


STORAGES: Mapping[str, NewStorage] = MappingProxyType(
    {"none": DenseStorage, "fp8": partial(QuantisedStorage, "fp8"), "int8": partial(QuantisedStorage, "int8")}
)
"""By the name of the quantisation."""
