"""The values of an adapter: from its file to one blob of the model's dtype, α / r folded into B, nothing not finite.

A file in the model's dtype is read straight to where it stays, as it lies: then nothing is computed but B's scaling,
and that only where it is not 1. Any other is converted, tensor by tensor, in the model's order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import WeightsFile
from specserve_adapters.helpers import Helpers, in_parallel
from specserve_adapters.host_adapter import HostAdapter, head_bytes, num_modules, unpack, write_places
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.safetensors_file import StoredTensor
from specserve_adapters.spec import LinearSpec, ModuleKey

# A product of activations and larger values may overflow float32, and infinity times the weight 0 of a neighbour that
# does not use the adapter is NaN.
MAX_MAGNITUDE = 1e30
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHARE = 8  # modules that a thread takes at once


class Factor(NamedTuple):
    """A or B of a module, as the file has it."""

    name: str
    stored: StoredTensor

    @property
    def numel(self) -> int:
        return math.prod(self.stored.shape)


class LoraModule(NamedTuple):
    """A module's LoRA: A [rank, in_features], B [out_features, rank], and what their product is multiplied with."""

    key: ModuleKey
    a: Factor
    b: Factor
    scaling: float


def read_weights(
    weights: WeightsFile,
    specs: Sequence[LinearSpec],
    modules: Sequence[LoraModule],
    dtype: torch.dtype,
    memory: HostMemory,
    helpers: Helpers,
) -> tuple[HostAdapter, list[bytes]]:
    """The adapter, and the hashes of the file's data as it was read. Raises AdapterError that names the tensor."""
    dtypes = {_dtype(factor) for module in modules for factor in module[1:3]}
    as_it_lies = dtypes == {dtype}
    count = num_modules(specs)
    size = sum(factor.numel for module in modules for factor in module[1:3]) * dtype.itemsize
    region = memory.take(head_bytes(count) + size)
    try:
        blob = unpack(region.memory, count, dtype)[1]
        data = blob.view(torch.uint8) if as_it_lies else torch.empty(weights.data_bytes, dtype=torch.uint8)
        looks = _finite_pieces(dtypes.pop()) if len(dtypes) == 1 else lambda piece: False
        hashes, fine = weights.read_data(data, helpers, looks)
        if not fine:
            _check_values(data, modules)
        places = _places(modules, dtype, as_it_lies)
        placed = list(zip(modules, places, strict=True))
        unsettled = [(m, place) for m, place in placed if not as_it_lies or m.scaling != 1.0]
        shares = [unsettled[first : first + _SHARE] for first in range(0, len(unsettled), _SHARE)]
        in_parallel(helpers, lambda share: _settle(share, data, blob), shares)
        factors = {
            module.key: (blob[a : a + module.a.numel].view(module.a.stored.shape),
                         blob[b : b + module.b.numel].view(module.b.stored.shape))
            for module, (a, b) in placed
        }  # fmt: skip
        write_places(region.memory, specs, blob, factors)
        adapter = HostAdapter(blob, factors, max(a.shape[0] for a, _ in factors.values()), region.memory)
    except BaseException:
        memory.free(region)
        raise
    memory.bind(region, adapter)
    return adapter, hashes


def _places(modules: Sequence[LoraModule], dtype: torch.dtype, as_it_lies: bool) -> list[tuple[int, int]]:
    """Element of the blob where each module's A and B begin."""
    if as_it_lies:
        return [(m.a.stored.begin // dtype.itemsize, m.b.stored.begin // dtype.itemsize) for m in modules]
    places: list[tuple[int, int]] = []
    end = 0
    for module in modules:
        places.append((end, end + module.a.numel))
        end += module.a.numel + module.b.numel
    return places


def _settle(share: Sequence[tuple[LoraModule, tuple[int, int]]], data: Tensor, blob: Tensor) -> None:
    """Put the modules' A and B · scaling into the blob."""
    for module, (a, b) in share:
        _settle_factor(module.a, 1.0, data, blob[a : a + module.a.numel])
        _settle_factor(module.b, module.scaling, data, blob[b : b + module.b.numel])


def _settle_factor(factor: Factor, scaling: float, data: Tensor, target: Tensor) -> None:
    source = _values(data, factor)
    lies_there = source.data_ptr() == target.data_ptr()
    if lies_there and scaling == 1.0:
        return
    # Folded in float64, so that B is rounded once; a power of two rounds nothing, whatever it is folded in.
    exact = target.dtype == torch.float64 or math.frexp(scaling)[0] == 0.5
    if scaling == 1.0:
        target.copy_(source)
    elif lies_there and exact:
        target.mul_(scaling)
    else:
        target.copy_(source.double().mul_(scaling))
    if not _finite_pieces(target.dtype, math.inf)(target):
        short = str(target.dtype).removeprefix("torch.")
        raise AdapterError(f"Tensor {factor.name} overflows {short}, alpha included.")


def _check_values(data: Tensor, modules: Sequence[LoraModule]) -> None:
    """Find the tensor whose values cannot be served, if there is one."""
    for module in modules:
        for factor in module[1:3]:
            values = _values(data, factor)
            if not bool(values.isfinite().all()):
                raise AdapterError(f"Tensor {factor.name} holds NaN or infinity.")
            if bool((values.abs() > MAX_MAGNITUDE).any()):
                raise AdapterError(f"Tensor {factor.name} holds values beyond ±{MAX_MAGNITUDE:g}.")


def _finite_pieces(dtype: torch.dtype, largest: float = MAX_MAGNITUDE) -> Callable[[Tensor], bool]:
    """Whether bytes of whole numbers of `dtype` are finite and at most `largest`, in two passes and no memory.

    Without its sign a float's bits grow with its magnitude, infinity and NaN beyond all: as signed integers the
    positive ones give the greatest, as unsigned the negative ones.
    """
    size = dtype.itemsize
    limit = int(torch.tensor(min(largest, torch.finfo(dtype).max), dtype=dtype).view(_BITS[size]))
    sign = 1 << (8 * size - 1)

    def fine(piece: Tensor) -> bool:
        bits = piece.view(torch.uint8).numpy().view(_UNSIGNED[size])
        if not len(bits):
            return True
        negative = int(bits.max())
        return int(bits.view(_SIGNED[size]).max()) <= limit and (negative < sign or negative - sign <= limit)

    return fine


def _values(data: Tensor, factor: Factor) -> Tensor:
    """The file's values [numel]; a copy where they do not begin at a multiple of their size."""
    dtype = _dtype(factor)
    raw = data[factor.stored.begin : factor.stored.end]
    return (raw if int(raw.storage_offset()) % dtype.itemsize == 0 else raw.clone()).view(dtype)


def _dtype(factor: Factor) -> torch.dtype:
    assert factor.stored.dtype is not None
    return factor.stored.dtype
