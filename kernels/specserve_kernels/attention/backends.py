"""The backends of paged attention by name. A new one registers here and is held to the same conformance tests."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from specserve_kernels.attention import reference as attention_ref
from specserve_kernels.attention import triton_backend as attention_triton
from specserve_kernels.attention.interface import AttentionBackend, AttentionMetadata, AttentionShape
from specserve_kernels.dispatch import backend, runs_triton

BACKENDS: Mapping[str, AttentionBackend] = MappingProxyType({"torch": attention_ref, "triton": attention_triton})


def choose(meta: AttentionMetadata, shape: AttentionShape) -> AttentionBackend:
    """The fastest backend for this model on the device of `meta`."""
    fastest = BACKENDS[backend(meta.positions, BACKENDS)]
    return fastest if fastest.takes(shape, meta.block_size) else attention_ref


def takes_ragged(shape: AttentionShape, block_size: int, device: torch.device) -> bool:
    """Whether metadata of this model on `device` may leave the sequences' lengths to the device."""
    return runs_triton(device) and attention_triton.takes(shape, block_size)
