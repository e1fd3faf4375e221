"""Counter-based random numbers: SplitMix64 bit for bit, and the statistics that sampling relies on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from specserve_kernels.sampling.random import Stream, bits_to_gumbel, gumbel, keys, mix64, token_bits, uniform

SAMPLES = 100_000
MASK = 2**64 - 1
P_VALUE = 1e-4


class SplitMix64:
    """The generator as Steele, Lea and Flood print it, on Python integers."""

    def __init__(self, seed: int) -> None:
        self.state = seed & MASK

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)


def to_unsigned(bits: Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint64)


def counters(varying: str) -> tuple[Tensor, Tensor, int]:
    """(seed, position, stream) of SAMPLES keys of which one thing varies, in steps of one as in real use."""
    index = torch.arange(SAMPLES)
    zero = torch.zeros_like(index)
    return (index, zero + 7, Stream.SAMPLE) if varying == "seed" else (zero + 7, index, Stream.SAMPLE)


def draws(varying: str) -> Tensor:
    """Uniform numbers from the bits of one token id, or of all token ids of one key."""
    if varying == "token":
        bits = token_bits(keys(torch.tensor(3), torch.tensor(11), Stream.DRAFT), SAMPLES)
    elif varying == "accept":
        return uniform(torch.arange(SAMPLES), torch.tensor(5), Stream.ACCEPT)
    else:
        bits = token_bits(keys(*counters(varying)), 3)[:, 1]
    return torch.from_numpy((to_unsigned(bits) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**63 - 1, -(2**63)])
def test_is_splitmix64(seed: int) -> None:
    position, stream, token = 9, Stream.DRAFT, 4
    outer = SplitMix64(seed)
    key = [outer.next() for _ in range(4 * position + stream + 1)][-1]
    inner = SplitMix64(key)
    expected = [inner.next() for _ in range(token + 1)]
    bits = token_bits(keys(torch.tensor(seed), torch.tensor(position), stream), token + 1)
    assert to_unsigned(bits).tolist() == expected
    assert uniform(torch.tensor(seed), torch.tensor(position), stream).item() == (expected[0] >> 11) * 2.0**-53
    assert mix64(seed + 0x9E3779B97F4A7C15) & MASK == SplitMix64(seed).next()


def test_same_value_whatever_the_batch() -> None:
    seed, position = torch.tensor([5, -6, 7]), torch.tensor([[0, 1], [100, 101], [2**40, 2**40 + 1]])
    stream = torch.tensor([[0], [1], [3]])
    batched = gumbel(seed[:, None], position, stream, 50)
    for row, column in itertools.product(range(3), range(2)):
        alone = gumbel(seed[row], position[row, column], int(stream[row, 0]), 20)
        assert torch.equal(alone, batched[row, column, :20])
    again = gumbel(seed[:, None], position, stream, 50)
    assert torch.equal(batched, again)


@pytest.mark.parametrize("varying", ["seed", "position", "token", "accept"])
def test_uniform_and_not_serially_correlated(varying: str) -> None:
    values = draws(varying).numpy()
    assert values.min() >= 0.0 and values.max() < 1.0
    assert stats.kstest(values, "uniform").pvalue > P_VALUE
    for lag in (1, 2, 4, 64):
        assert stats.pearsonr(values[:-lag], values[lag:]).pvalue > P_VALUE
        blocks = values[: SAMPLES // (2 * lag) * 2 * lag].reshape(-1, 2, lag)  # pairs that share no value
        pairs = np.histogram2d(blocks[:, 0].ravel(), blocks[:, 1].ravel(), bins=16, range=[[0, 1]] * 2)[0]
        assert stats.chisquare(pairs.ravel()).pvalue > P_VALUE


@pytest.mark.parametrize("varying", ["seed", "position", "token"])
def test_every_bit_is_fair(varying: str) -> None:
    if varying == "token":
        bits = token_bits(keys(torch.tensor(3), torch.tensor(11), Stream.RESIDUAL), SAMPLES)
    else:
        bits = token_bits(keys(*counters(varying)), 1)[:, 0]
    octets = to_unsigned(bits).copy().view(np.uint8).reshape(-1, 8)
    for column in octets.T:
        assert stats.chisquare(np.bincount(column, minlength=256)).pvalue > P_VALUE
    ones = np.unpackbits(octets, axis=1).sum(axis=0)  # of each of the 64 bits
    deviations = (ones - SAMPLES / 2) / math.sqrt(SAMPLES / 4)
    assert stats.chi2.sf((deviations**2).sum(), 64) > P_VALUE


def test_neighbours_are_independent() -> None:
    """Streams of one position, positions, seeds and tokens next to each other: no pair is correlated."""
    seed, position = torch.arange(SAMPLES), torch.tensor(40)
    columns = [gumbel(seed, position, stream, 2) for stream in Stream]
    columns += [gumbel(seed, position + 1, Stream.SAMPLE, 2), gumbel(seed + 1, position, Stream.SAMPLE, 2)]
    correlation = torch.corrcoef(torch.cat(columns, dim=1).T)
    off_diagonal = correlation - torch.eye(correlation.shape[0])
    # 66 pairs: 5 standard deviations are a p-value of 4e-5 for all of them together
    assert off_diagonal.abs().max() < 5 / math.sqrt(SAMPLES)


def test_flipping_one_input_bit_flips_half_the_output() -> None:
    seed = torch.arange(2000) * 977
    base = to_unsigned(keys(seed, torch.tensor(3), Stream.SAMPLE))
    for bit in range(0, 63, 3):
        flipped = to_unsigned(keys(seed ^ (1 << bit), torch.tensor(3), Stream.SAMPLE))
        distance = np.unpackbits((base ^ flipped).view(np.uint8)).mean()
        assert abs(distance - 0.5) < 5 * 0.5 / math.sqrt(64 * 2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_distribution(dtype: torch.dtype) -> None:
    noise = gumbel(torch.arange(SAMPLES), torch.tensor(0), Stream.SAMPLE, 1, dtype)[:, 0]
    assert noise.dtype == dtype
    assert stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > P_VALUE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_is_finite_and_precise_in_the_upper_tail(dtype: torch.dtype) -> None:
    top = torch.tensor([0, 1, 2, 3, 1000, 2**30 + 1, 2**52, 2**53 - 1], dtype=torch.int64)  # v * 2^53
    noise = bits_to_gumbel(top << 11, dtype).double()
    assert torch.isfinite(noise).all()
    assert (noise[:-1] > noise[1:]).all(), "noise falls as v grows"
    for value, got in zip(top[1:-1].tolist(), noise[1:-1].tolist(), strict=True):
        exact = -math.log(-math.log1p(-value * 2.0**-53))
        assert got == pytest.approx(exact, rel=8 * torch.finfo(dtype).eps)
    assert noise[0] == pytest.approx(54 * math.log(2), rel=1e-6)
