"""Counter-based random numbers: a pure function of (seed, absolute position, stream, token id).

No generator state exists, so a draw does not depend on the batch, on the step or on how often it is made: the
idea of Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The bits are SplitMix64's
(Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of Stafford's mix 13):

    key  = mix64(seed + GAMMA * (4 * position + stream + 1))    one key a (seed, position, stream)
    bits = mix64(key + GAMMA * (token + 1))                     one 64-bit word a token id of the full vocabulary

modulo 2^64, on int64 tensors: multiplication and addition wrap, and a logical shift is an arithmetic one and a mask.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

NUM_STREAMS = 4
_WORD = 2**64


class Stream(IntEnum):
    """What a number is for. Two uses at one position never share a stream, or their outcomes would be correlated."""

    SAMPLE = 0  # the target's own sample; coupled drafts use it too, on purpose
    DRAFT = 1  # a draft of the rejection method
    ACCEPT = 2  # whether a draft is accepted
    RESIDUAL = 3  # the sample after the first rejection


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


GAMMA = _signed(0x9E3779B97F4A7C15)
_MUL1 = _signed(0xBF58476D1CE4E5B9)
_MUL2 = _signed(0x94D049BB133111EB)


def mix64(word: int) -> int:
    """SplitMix64's finaliser of one Python integer, as a signed 64-bit integer.

    For seeds on the host: users' seeds are small and alike (0, 1, 2, …), mixed ones share no structure with GAMMA.
    """
    word %= _WORD
    word = (word ^ (word >> 30)) * _MUL1 % _WORD
    word = (word ^ (word >> 27)) * _MUL2 % _WORD
    return _signed(word ^ (word >> 31))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(z: Tensor) -> Tensor:
    """`mix64` of every element of an int64 tensor, in place (z must be the caller's own)."""
    z = z.bitwise_xor_(_logical_shift(z, 30)).mul_(_MUL1)
    z = z.bitwise_xor_(_logical_shift(z, 27)).mul_(_MUL2)
    return z.bitwise_xor_(_logical_shift(z, 31))


def keys(seed: Tensor, position: Tensor, stream: int | Tensor) -> Tensor:
    """One key a (seed, position, stream): int64 tensors that broadcast together → int64 [..]."""
    counter = position * NUM_STREAMS + (stream + 1)
    return _mix_(counter * GAMMA + seed)


def token_bits(key: Tensor, vocab_size: int) -> Tensor:
    """The 64 random bits of every token id: key int64 [..] → int64 [.., vocab]."""
    counters = torch.arange(1, vocab_size + 1, device=key.device) * GAMMA  # [vocab]
    return _mix_(key.unsqueeze(-1) + counters)


def bits_to_gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard Gumbel noise −log(−log(1 − v)) from 64 random bits; v = 2^-53 · (top 53 bits) is uniform in [0, 1).

    The noise that wins an argmax is large, so v near 0 must be precise: log1p keeps v's full relative precision, where
    −log(−log u) with u near 1 would know it to 2^-24 in float32. v = 0 becomes 2^-54 and v = 1 (by rounding in float32)
    the largest number below, so that every value is finite: in [−3.7, 37.5].
    """
    largest = 2.0**53 * (1.0 - torch.finfo(dtype).eps / 2)
    v = _logical_shift(bits, 11).to(dtype).clamp_(0.5, largest)
    return v.mul_(-(2.0**-53)).log1p_().neg_().log_().neg_()


def gumbel(
    seed: Tensor, position: Tensor, stream: int | Tensor, vocab_size: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Standard Gumbel noise for every token id.

    seed, position: int64, broadcast together to [..]; stream: a Stream, or int64 that broadcasts with them.
    Returns [.., vocab] of dtype float32 or float64.
    """
    return bits_to_gumbel(token_bits(keys(seed, position, stream), vocab_size), dtype)


def uniform(seed: Tensor, position: Tensor, stream: int | Tensor) -> Tensor:
    """Uniform in [0, 1): int64 tensors that broadcast to [..] → float64 [..], multiples of 2^-53 (never 1)."""
    bits = _mix_(keys(seed, position, stream).add_(GAMMA))  # the bits of token 0
    return _logical_shift(bits, 11).to(torch.float64).mul_(2.0**-53)
