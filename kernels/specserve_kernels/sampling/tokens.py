"""Gumbel-max sampling with counter-based noise.

    token = argmax_x (logits[x] / divisor + g[x]),    g[x] = −log(−log(1 − v(seed, position, stream, x)))

is a draw from softmax(logits / divisor) (Gumbel 1954; Maddison, Tarlow, Minka, "A* sampling", 2014). A row of
temperature 0 takes the argmax. Equal values go to the lower token id. Logits are processed ones, but for the division
by the temperature where a divisor is given; −inf is an impossible token. float64 stays float64, all else is computed in
float32.

Shapes: logits [.., vocab], seed, position, temperature, divisor: broadcast to [..]; tokens [..] int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.sampling.best_token import best_tokens
from specserve_kernels.sampling.cut import Cut, cut_logits
from specserve_kernels.sampling.drafting import draw_with_softmax
from specserve_kernels.sampling.random import Stream, gumbel


def divided(logits: Tensor, divisor: Tensor | None) -> Tensor:
    """logits [.., vocab] / divisor [..], in float32 if not float64."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits if divisor is None else logits / divisor.unsqueeze(-1)


def gumbel_argmax_ref(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    stream: int | Tensor,
    divisor: Tensor | None = None,
) -> Tensor:
    """The formula above, in torch."""
    logits = divided(logits, divisor)
    noise = gumbel(seed, position, stream, logits.shape[-1], logits.dtype)
    noise.mul_((temperature > 0).unsqueeze(-1))  # the noise is finite, so a greedy row's becomes 0
    return noise.add_(logits).argmax(-1)


def _flat(values: Tensor, shape: torch.Size) -> Tensor:
    return values.expand(shape).reshape(-1).contiguous()  # a reshape of one element may keep a stride of 0


def gumbel_argmax_triton(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    stream: int | Tensor,
    divisor: Tensor | None = None,
) -> Tensor:
    shape = logits.shape[:-1]
    stream = _flat(stream, shape) if isinstance(stream, Tensor) else stream
    flat = [None if values is None else _flat(values, shape) for values in (seed, position, temperature, divisor)]
    rows = logits.reshape(-1, 1, logits.shape[-1])
    return best_tokens(rows, flat[0], flat[1], flat[2], stream, flat[3]).view(shape)


_GUMBEL_ARGMAX = {"torch": gumbel_argmax_ref, "triton": gumbel_argmax_triton}


def gumbel_argmax(
    logits: Tensor,
    seed: Tensor,
    position: Tensor,
    temperature: Tensor,
    stream: int | Tensor,
    divisor: Tensor | None = None,
) -> Tensor:
    """Sample one token for each of [..] distributions; stream: a Stream, or an int64 tensor that broadcasts to [..]."""
    run = _GUMBEL_ARGMAX[backend(logits, _GUMBEL_ARGMAX)]
    return run(logits, seed, position, temperature, stream, divisor)


def greedy_ref(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def greedy_triton(logits: Tensor) -> Tensor:
    rows = logits.reshape(-1, 1, logits.shape[-1])
    return best_tokens(rows, None, None, None, 0, None).view(logits.shape[:-1])


_GREEDY = {"torch": greedy_ref, "triton": greedy_triton}


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each of [..] rows of raw logits [.., vocab], of any float dtype: int64 [..]."""
    return _GREEDY[backend(logits, _GREEDY)](logits)


def sample_tokens_ref(
    logits: Tensor,
    divisor: Tensor | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    cut: Cut | None = None,
) -> Tensor:
    positions = first_position[:, None] + torch.arange(logits.shape[1], device=logits.device)
    if cut is not None:
        logits, divisor = cut_logits(logits, divisor, cut), None
    divisor = None if divisor is None else divisor[:, None]
    return gumbel_argmax_ref(logits, seed[:, None], positions, temperature[:, None], Stream.SAMPLE, divisor)


def sample_tokens_triton(
    logits: Tensor,
    divisor: Tensor | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    cut: Cut | None = None,
) -> Tensor:
    dense = [None if one is None else one.contiguous() for one in (seed, first_position, temperature, divisor)]
    return best_tokens(logits, dense[0], dense[1], dense[2], Stream.SAMPLE, dense[3], cut)


_SAMPLE_TOKENS = {"torch": sample_tokens_ref, "triton": sample_tokens_triton}


def sample_tokens(
    logits: Tensor,
    divisor: Tensor | None,
    seed: Tensor,
    first_position: Tensor,
    temperature: Tensor,
    cut: Cut | None = None,
) -> Tensor:
    """The target's own token at each of Q positions, without a processed copy of the logits.

    logits [B, Q, vocab], raw or processed but for the temperature, of any float dtype, dense in their last dimension;
    divisor [B]: the temperature, 1 where greedy (None: 1 everywhere); seed, first_position [B] int64: the absolute
    position of the token that position 0 predicts; temperature [B], 0: greedy; cut: what top_k and top_p leave of these
    rows. Returns [B, Q] int64.
    """
    assert logits.stride(-1) == 1, "the vocabulary must be dense"
    run = _SAMPLE_TOKENS[backend(logits, _SAMPLE_TOKENS)]
    return run(logits, divisor, seed, first_position, temperature, cut)


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
        return greedy(processed)
    return gumbel_argmax(processed, seed.unsqueeze(-1), positions, temperature.unsqueeze(-1), stream)


def draw_with_softmax_ref(
    processed: Tensor, seed: Tensor, position: Tensor, temperature: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from rows of processed logits [B, vocab], and the softmax [B, vocab] they were drawn from."""
    return gumbel_argmax_ref(processed, seed, position, temperature, stream), processed.softmax(-1)


_DRAW_WITH_SOFTMAX = {"torch": draw_with_softmax_ref, "triton": draw_with_softmax}


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
        return greedy(processed), None
    if not any_rejection:
        return gumbel_argmax(processed, seed, position, temperature, Stream.SAMPLE), None
    stream = torch.where(is_coupled, Stream.SAMPLE, Stream.DRAFT)  # [B]
    return _DRAW_WITH_SOFTMAX[backend(processed, _DRAW_WITH_SOFTMAX)](processed, seed, position, temperature, stream)
