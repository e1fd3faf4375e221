"""What a safetensors file says that it holds (https://huggingface.co/docs/safetensors): names, dtypes, shapes, places.

A file is 8 bytes of length n, little-endian, n bytes of JSON, and the tensors' bytes, without holes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import msgspec
import torch

from specserve.core.errors import AdapterError

PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """Where a tensor's bytes lie among the data, and what they are (dtype None: none that torch has)."""

    dtype: torch.dtype | None
    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def header_bytes(prefix: bytes, file_bytes: int) -> int:
    """Bytes of a file before its data, from its first bytes; no more than it has, whatever it claims."""
    return min(file_bytes, PREFIX_BYTES + int.from_bytes(prefix[:PREFIX_BYTES], "little"))


def parse_header(header: bytes, file_bytes: int) -> dict[str, StoredTensor]:
    """The tensors by name; `header` as long as `header_bytes` says. Raises AdapterError unless they fill the file."""
    length = int.from_bytes(header[:PREFIX_BYTES], "little")
    if len(header) < PREFIX_BYTES or length != len(header) - PREFIX_BYTES or length > _MAX_HEADER_BYTES:
        raise _unreadable("the header is cut off")
    try:
        raw: dict[str, Any] = msgspec.json.decode(header[PREFIX_BYTES:], type=dict[str, Any])
        raw.pop("__metadata__", None)
        entries = msgspec.convert(raw, dict[str, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(f"the header: {error}") from error
    tensors = {name: _stored(name, entry) for name, entry in entries.items()}
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != end:
            raise _unreadable("the tensors overlap or leave holes")
        end = tensor.end
    if end != file_bytes - len(header):
        raise _unreadable(f"it should hold {end} bytes of tensors, but holds {file_bytes - len(header)}")
    return tensors


def _stored(name: str, entry: _Entry) -> StoredTensor:
    begin, end = entry.data_offsets
    dtype = _DTYPES.get(entry.dtype)
    if min(0, *entry.shape) < 0 or not 0 <= begin <= end:
        raise _unreadable(f"tensor {name} has an impossible shape or place")
    if dtype is not None and math.prod(entry.shape) * dtype.itemsize != end - begin:
        raise _unreadable(f"tensor {name} has {end - begin} bytes, which do not fit its shape {entry.shape}")
    shown = entry.dtype if dtype is None else str(dtype).removeprefix("torch.")
    return StoredTensor(dtype, shown, tuple(entry.shape), begin, end)


def _unreadable(reason: str) -> AdapterError:
    return AdapterError(f"adapter_model.safetensors cannot be read: {reason}.")
