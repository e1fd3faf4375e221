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
from specserve_adapters.adapter_files import PIECE_BYTES, WeightsFile
from specserve_adapters.helpers import Helpers, in_parallel
from specserve_adapters.host_adapter import Factors, HostAdapter, head_bytes, num_modules, unpack, write_places
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.safetensors_file import StoredTensor
from specserve_adapters.spec import LinearSpec, ModuleKey

# A product of activations and larger values may overflow float32, and infinity times the weight 0 of a neighbour that
# does not use the adapter is NaN.
MAX_MAGNITUDE = 1e30
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGNED = {2: np.int16, 4: np.int32, 8: np.int64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHARE = 32  # modules that a thread takes at once


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
        factors = {
            module.key: (_part(blob, a, module.a), _part(blob, b, module.b))
            for module, (a, b) in zip(modules, _places(modules, dtype, as_it_lies), strict=True)
        }
        if not as_it_lies or any(module.scaling != 1.0 for module in modules):
            _settle(data, modules, factors, helpers)
            _check_overflow(blob, modules, factors, helpers)
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


def _part(blob: Tensor, begin: int, factor: Factor) -> Tensor:
    return blob[begin : begin + factor.numel].view(factor.stored.shape)


def _settle(data: Tensor, modules: Sequence[LoraModule], factors: Factors, helpers: Helpers) -> None:
    """Put every A and B · scaling into the blob, where they do not lie already."""

    def settle(share: Sequence[LoraModule]) -> None:
        for module in share:
            a, b = factors[module.key]
            _settle_factor(data, module.a, 1.0, a)
            _settle_factor(data, module.b, module.scaling, b)

    in_parallel(helpers, settle, [modules[first : first + _SHARE] for first in range(0, len(modules), _SHARE)])


def _settle_factor(data: Tensor, factor: Factor, scaling: float, target: Tensor) -> None:
    lies_there = data.data_ptr() + factor.stored.begin == target.data_ptr()
    if lies_there and scaling == 1.0:
        return
    # Folded in float64, so that B is rounded once; a power of two rounds nothing, whatever it is folded in.
    if lies_there and (target.dtype == torch.float64 or math.frexp(scaling)[0] == 0.5):
        target.mul_(scaling)
        return
    source = _values(data, factor).view(factor.stored.shape)
    target.copy_(source if scaling == 1.0 else source.double().mul_(scaling))


def _check_overflow(blob: Tensor, modules: Sequence[LoraModule], factors: Factors, helpers: Helpers) -> None:
    """Find what became infinite by its scaling or by a narrower dtype, if anything did."""
    finite = _finite_pieces(blob.dtype, math.inf)
    if all(in_parallel(helpers, finite, torch.split(blob, PIECE_BYTES // blob.element_size()))):
        return
    for module in modules:
        for factor, values in zip(module[1:3], factors[module.key], strict=True):
            if not finite(values):
                short = str(blob.dtype).removeprefix("torch.")
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
