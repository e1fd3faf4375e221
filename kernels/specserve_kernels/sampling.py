"""Gumbel-max sampling with counter-based noise.

    token = argmax_x (logits[x] + g[x]),    g[x] = −log(−log(1 − v(seed, position, stream, x)))

is a draw from softmax(logits) (Gumbel 1954; Maddison, Tarlow, Minka, "A* sampling", 2014). A row of temperature 0
takes the argmax of its logits. Equal values go to the lower token id. Logits are processed ones: temperature and every
other processor have been applied; −inf is an impossible token. float64 stays float64, all else is float32.

Shapes: logits [.., vocab], seed, position, temperature: broadcast to [..]; tokens [..] int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.random import Stream, gumbel


def gumbel_argmax_ref(
    logits: Tensor, seed: Tensor, position: Tensor, temperature: Tensor, stream: int | Tensor
) -> Tensor:
    """The formula above, in torch."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    noise = gumbel(seed, position, stream, logits.shape[-1], dtype)
    noise.mul_((temperature > 0).unsqueeze(-1))  # the noise is finite, so a greedy row's becomes 0
    return noise.add_(logits).argmax(-1)


_IMPLEMENTATIONS = {"torch": gumbel_argmax_ref}


def gumbel_argmax(logits: Tensor, seed: Tensor, position: Tensor, temperature: Tensor, stream: int | Tensor) -> Tensor:
    """Sample one token for each of [..] distributions; stream: a Stream, or an int64 tensor that broadcasts to [..]."""
    return _IMPLEMENTATIONS[backend(logits, _IMPLEMENTATIONS)](logits, seed, position, temperature, stream)


def sample(
    processed: Tensor,
    seed: Tensor,
    positions: Tensor,
    temperature: Tensor,
    stream: int | Tensor = Stream.SAMPLE,
    *,
    any_sampled: bool = True,
) -> Tensor:
    """Sample a token at each of Q positions of each row.

    processed [B, Q, vocab] float; seed [B] int64; positions [B, Q] int64, the absolute position of the token sampled;
    temperature [B] (0: greedy); any_sampled: host knowledge, False (all greedy) saves the noise. Returns [B, Q] int64.
    """
    if not any_sampled:
        return processed.argmax(-1)
    return gumbel_argmax(processed, seed.unsqueeze(-1), positions, temperature.unsqueeze(-1), stream)


def draft_sample(
    processed: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    is_coupled: Tensor,
    *,
    any_coupled: bool = True,
    any_rejection: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Draw one draft a row, with the noise that `rejection.verify` expects of its method.

    Coupled rows use the noise that the target will use at that position; rejection rows their own stream, and q is
    exactly the softmax that the draft was drawn from.

    processed [B, vocab]: the draft model's processed logits; seed, position [B] int64: the absolute position of the
    token drawn; temperature [B]; is_coupled [B] bool. any_coupled / any_rejection: host knowledge, whether any row of
    temperature > 0 uses that method. Returns (tokens [B] int64, q [B, vocab], or None where no row needs it).
    """
    if not (any_coupled or any_rejection):
        return processed.argmax(-1), None
    if not any_rejection:
        return gumbel_argmax(processed, seed, position, temperature, Stream.SAMPLE), None
    stream = torch.where(is_coupled, Stream.SAMPLE, Stream.DRAFT)  # [B]
    return gumbel_argmax(processed, seed, position, temperature, stream), processed.softmax(-1)
