"""Norm, rotary, activation and cache writes against independent formulations, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.activation import silu_mul
from specserve_kernels.dispatch import backend
from specserve_kernels.kv_cache import write_kv_ref
from specserve_kernels.norm import rms_norm, sum_dtype
from specserve_kernels.qkv import rotate_and_cache
from specserve_kernels.rotary import rotary_ref
from specserve_kernels.tolerances import OP

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = OP[actual.dtype]
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def eps(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=sum_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (3, 5, 17)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # the small one makes eps count
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    x, weight = random(*shape, dtype=dtype) * scale, random(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(rms_norm(x, weight, eps(1e-5, dtype)), expected)


def test_rms_norm_with_a_weight_per_head() -> None:
    x, weight = random(4, 3, 9, dtype=torch.float64), random(3, 9, dtype=torch.float64, seed=1)
    expected = torch.stack([torch.nn.functional.rms_norm(x[:, h], (9,), weight[h], 1e-6) for h in range(3)], dim=1)
    close(rms_norm(x, weight, eps(1e-6, torch.float64)), expected)


def test_rms_norm_of_large_half_precision_values_stays_finite() -> None:
    x = torch.full((1, 64), 6e4, dtype=torch.float16)
    close(rms_norm(x, torch.ones(64, dtype=torch.float16), eps(1e-5, torch.float16)), torch.ones(1, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (7, 3, 10), (5, 4, 16)])
def test_rotary_is_a_complex_rotation(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    whole = random(tokens, heads + 2, dim, dtype=dtype)
    x = whole[:, :heads]  # a slice of a merged product, as the layers pass it
    angles = random(tokens, 1, dim // 2, dtype=torch.float64, seed=1)
    cos = torch.cat((angles.cos(), angles.cos()), -1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).to(dtype)
    pairs = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    close(rotary_ref(x, cos, sin), torch.cat((pairs.real, pairs.imag), -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (5, 13)])
def test_silu_mul(dtype: torch.dtype, tokens: int, size: int) -> None:
    gate_up = random(tokens, 2 * size, dtype=dtype)
    before = gate_up.clone()
    gate, up = gate_up.double().chunk(2, -1)
    close(silu_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before)


def test_write_kv_touches_only_its_slots() -> None:
    k_cache, v_cache = random(12, 2, 3, dtype=torch.float32), random(12, 2, 3, dtype=torch.float32, seed=1)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    k, v = random(4, 2, 3, dtype=torch.float32, seed=2), random(4, 2, 3, dtype=torch.float32, seed=3)
    slots = [11, 0, 5, 0]  # two padding tokens share slot 0, which nobody reads
    write_kv_ref(k, v, k_cache, v_cache, torch.tensor(slots))
    for token in (0, 2):
        want_k[slots[token]], want_v[slots[token]] = k[token], v[token]
    assert torch.equal(k_cache[1:], want_k[1:]) and torch.equal(v_cache[1:], want_v[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("finite", [False, True])
def test_rotate_and_cache(dtype: torch.dtype, normed: bool, finite: bool) -> None:
    tokens, heads, kv_heads, dim = 3, 4, 2, 6
    qkv = random(tokens, heads + 2 * kv_heads, dim, dtype=dtype)
    if finite:
        qkv[0, 0, 0], qkv[1, heads, 1], qkv[2, -1, 2] = float("nan"), float("inf"), float("-inf")
    angles = random(tokens, 1, dim // 2, dtype=torch.float64, seed=1)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    weight = random(heads + kv_heads, dim, dtype=dtype, seed=2)
    wide = qkv.double().masked_fill(~qkv.isfinite(), 0.0)
    qk, v = wide[:, : heads + kv_heads], wide[:, heads + kv_heads :]
    if normed:
        qk = qk / (qk.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    turned = torch.complex(*qk.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.cat((turned.real, turned.imag), -1)
    k_cache, v_cache = torch.zeros(2, 8, kv_heads, dim, dtype=dtype)
    slots = torch.tensor([6, 2, 5])
    norm = (weight, eps(1e-6, dtype)) if normed else None
    q = rotate_and_cache(
        qkv.view(tokens, -1), cos.to(dtype), sin.to(dtype), k_cache, v_cache, slots,
        heads=heads, norm=norm, finite=finite,
    )  # fmt: skip
    close(q, turned[:, :heads])
    close(k_cache[slots], turned[:, heads:])
    close(v_cache[slots], v)
    assert not k_cache[[0, 1, 3, 4, 7]].any() and not v_cache[[0, 1, 3, 4, 7]].any()


def test_backend_of_a_cpu_tensor_is_torch() -> None:
    assert backend(torch.zeros(1), {"torch": None, "triton": None}) == "torch"
