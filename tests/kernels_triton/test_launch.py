"""Kernels launched anew through what was kept of their first launch."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.language import tl, triton
from specserve_kernels.launch import Relaunched, relaunched


@relaunched
@triton.jit
def _scale_kernel(x, out, count, gain, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0) * FACTOR
    if gain is not None:
        value *= tl.load(gain)
    tl.store(out + i, value, mask=i < count)


def scaled(x: torch.Tensor, gain: torch.Tensor | None, factor: int) -> torch.Tensor:
    out = torch.zeros_like(x)
    count = x.numel()
    _scale_kernel[(triton.cdiv(count, 32),)](x, out, count, gain, FACTOR=factor, BLOCK=32)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_launch_is_the_right_kernel(dtype: torch.dtype, device: torch.device) -> None:
    """Counts of 1, multiples of 16 and others, aligned or not, with a pointer and without; first and later launches."""
    values = torch.arange(100, device=device).to(dtype)
    gain = torch.full((1,), 3.0, dtype=dtype, device=device)
    for _ in range(3):
        for first in (0, 1, 16):
            for count in (1, 31, 48):
                for factor in (2, 5):
                    x = values[first : first + count]
                    assert torch.equal(scaled(x, None, factor), x * factor)
                    assert torch.equal(scaled(x, gain, factor), x * factor * 3)


def test_later_launches_bind_nothing(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    assert isinstance(_scale_kernel, Relaunched)
    x = torch.ones(64, device=device)
    scaled(x, None, 7)
    kernel, _scale_kernel.fn = _scale_kernel.fn, None
    try:
        assert torch.equal(scaled(x, None, 7), x * 7)
    finally:
        _scale_kernel.fn = kernel
