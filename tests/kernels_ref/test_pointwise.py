"""Norm, rotary, activation and cache writes against independent formulations, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels.activation import silu_mul
from specserve_kernels.dispatch import backend
from specserve_kernels.kv_cache import write_kv
from specserve_kernels.norm import rms_norm, sum_dtype
from specserve_kernels.rotary import rotary
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
    close(rotary(x, cos, sin), torch.cat((pairs.real, pairs.imag), -1))


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
    write_kv(k, v, k_cache, v_cache, torch.tensor(slots))
    for token in (0, 2):
        want_k[slots[token]], want_v[slots[token]] = k[token], v[token]
    assert torch.equal(k_cache[1:], want_k[1:]) and torch.equal(v_cache[1:], want_v[1:])


def test_backend_of_a_cpu_tensor_is_torch() -> None:
    assert backend(torch.zeros(1), {"torch": None, "triton": None}) == "torch"
