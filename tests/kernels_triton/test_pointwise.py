"""The pointwise Triton kernels against their references in float64, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specserve_kernels.activation import silu_mul_ref, silu_mul_triton
from specserve_kernels.norm import rms_norm_ref, rms_norm_triton
from specserve_kernels.qkv import rotate_and_cache_ref, rotate_and_cache_triton
from specserve_kernels.tolerances import OP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLOTS = 80


def close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = OP[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the small one makes eps count
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (2, 2048), (3, 5, 17), (67, 16)])
def test_rms_norm(shape: tuple[int, ...], scale: float, dtype: torch.dtype, device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=device) * scale
    weight, eps = random(shape[-1], dtype=dtype, device=device, seed=1), torch.tensor(1e-5, device=device)
    close(rms_norm_triton(x, weight, eps), rms_norm_ref(x.double(), weight.double(), eps.double()))


def test_rms_norm_with_a_weight_per_head_of_a_slice(device: torch.device) -> None:
    x = random(7, 6, 10, dtype=torch.bfloat16, device=device)[:, :5]
    weight, eps = random(5, 10, dtype=torch.bfloat16, device=device, seed=1), torch.tensor(1e-6, device=device)
    close(rms_norm_triton(x, weight, eps), rms_norm_ref(x.double(), weight.double(), eps.double()))


def test_rms_norm_of_large_half_precision_values_stays_finite(device: torch.device) -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16, device=device)
    close(rms_norm_triton(x, torch.ones_like(x[0]), torch.tensor(1e-5, device=device)), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (5, 13), (3, 600), (2, 2048)])
def test_silu_mul(tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(tokens, 2 * size, dtype=dtype, device=device) * 5
    before = gate_up.clone()
    close(silu_mul_triton(gate_up), silu_mul_ref(gate_up.double()))
    assert torch.equal(gate_up, before)


def test_silu_mul_of_a_prefill(device: torch.device) -> None:
    gate_up = random(70, 2 * 2048, dtype=torch.bfloat16, device=device)  # beyond the tile of a decode
    close(silu_mul_triton(gate_up), silu_mul_ref(gate_up.double()))


def check_qkv(
    tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: torch.device,
    *, normed: bool, finite: bool,
) -> None:  # fmt: skip
    """Run the kernel and the reference in float64, and compare queries and whole caches."""
    qkv = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype, device=device)
    if finite:
        qkv.view(-1)[:: qkv.numel() // 7] = float("nan")
        qkv.view(-1)[1 :: qkv.numel() // 5] = float("inf")
        qkv.view(-1)[2 :: qkv.numel() // 6] = float("-inf")
    angles = random(tokens, 1, dim // 2, dtype=torch.float64, device=device, seed=1)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    weight = random(heads + kv_heads, dim, dtype=dtype, device=device, seed=2)
    eps = torch.tensor(1e-6, device=device)
    # Two layers in one allocation: a cache's slots need not follow one another without a gap.
    caches = random(SLOTS, 2, kv_heads, dim, dtype=dtype, device=device, seed=3)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(4))[:tokens].to(device)
    wide = caches.double()
    expected = rotate_and_cache_ref(
        qkv.double(), cos.double(), sin.double(), wide[:, 0], wide[:, 1], slots,
        heads=heads, norm=(weight.double(), eps.double()) if normed else None, finite=finite,
    )  # fmt: skip
    q = rotate_and_cache_triton(
        qkv, cos, sin, caches[:, 0], caches[:, 1], slots,
        heads=heads, norm=(weight, eps) if normed else None, finite=finite,
    )  # fmt: skip
    assert q.is_contiguous()
    close(q, expected)
    close(caches, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 2), (3, 1, 10), (4, 2, 16), (5, 5, 6)])
def test_rotate_and_cache(
    heads: int, kv_heads: int, dim: int, normed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check_qkv(5, heads, kv_heads, dim, dtype, device, normed=normed, finite=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(14, 2, 64), (4, 4, 80), (6, 2, 96), (4, 1, 128), (2, 1, 256)])
def test_rotate_and_cache_of_models_head_dims(
    heads: int, kv_heads: int, dim: int, normed: bool, device: torch.device
) -> None:
    check_qkv(2, heads, kv_heads, dim, torch.bfloat16, device, normed=normed, finite=False)


def test_rotate_and_cache_of_a_prefill(device: torch.device) -> None:
    check_qkv(70, 5, 2, 32, torch.bfloat16, device, normed=True, finite=True)  # beyond the tile of a decode
