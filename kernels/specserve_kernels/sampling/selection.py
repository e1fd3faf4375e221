"""top_k: keep the k most probable tokens. top_p, after it: keep the fewest tokens whose mass is at least p of what is
left (Holtzman et al. 2020), the one that crosses p included. Of equal tokens the lower id counts as the more probable.

Shapes: logits [B, Q, vocab] float32 or float64; top_k [B] int64, vocab where off; top_p [B], inf where off. What is not
kept becomes −inf; a row with neither stays as it is.

The reference: sorting a vocabulary is dear, and the answer is nearly always among the few most probable tokens: these
are taken by selection, and all are sorted only where the few are not enough. Only the number of tokens kept and the
least of them is needed, no order of token ids. The GPU's way, which never sorts, is in threshold.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.dispatch import backend
from specserve_kernels.sampling.cut import Cut, cut_logits
from specserve_kernels.sampling.threshold import find_cut, top_k_top_p_triton
from specserve_kernels.sampling.tokens import divided

NUM_CANDIDATES = 256


def top_k_top_p_ref(
    logits: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int, any_top_p: bool, any_top_p_alone: bool
) -> Tensor:
    total = logits.logsumexp(-1, keepdim=True)
    few_may_do = max_top_k <= NUM_CANDIDATES and not (any_top_p_alone and logits.is_cuda)  # a GPU would have to wait
    if few_may_do and logits.shape[-1] > NUM_CANDIDATES:
        descending = logits.topk(NUM_CANDIDATES, dim=-1).values
        mass = (descending - total).exp_().cumsum(-1)  # [B, Q, candidates]
        if not any_top_p_alone or _is_reached(mass, top_k, top_p, logits.shape[-1]):
            return _keep(logits, descending, _num_kept(mass, top_k, top_p, any_top_p, logits.shape[-1]), top_k, top_p)
    descending = logits.sort(dim=-1, descending=True).values
    mass = (descending - total).exp_().cumsum(-1)  # [B, Q, V]
    return _keep(logits, descending, _num_kept(mass, top_k, top_p, any_top_p, logits.shape[-1]), top_k, top_p)


def _is_reached(mass: Tensor, top_k: Tensor, top_p: Tensor, vocab_size: int) -> bool:
    """Whether the candidates' mass reaches p at every position of every row that has top_p and no top_k."""
    needs_nothing = (top_k < vocab_size) | top_p.isinf()
    return bool(((mass[..., -1] >= top_p[:, None]) | needs_nothing[:, None]).all())


def _num_kept(mass: Tensor, top_k: Tensor, top_p: Tensor, any_top_p: bool, vocab_size: int) -> Tensor:
    """How many tokens stay, from the cumulated mass of the descending ones: [B, Q, C] → [B, Q, 1] int64, at most C."""
    kept = top_k.clamp(max=mass.shape[-1])[:, None, None].expand(-1, mass.shape[1], 1)
    if not any_top_p:
        return kept
    # top_p is of what top_k left; without top_k that is all, and 1
    left = torch.where((top_k < vocab_size)[:, None, None], mass.gather(-1, kept - 1), 1.0)
    needed = top_p[:, None, None] * left
    # a token stays if those before it are not enough
    return torch.minimum(kept, (mass[..., :-1] < needed).sum(-1, keepdim=True) + 1)


def _keep(logits: Tensor, descending: Tensor, kept: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Mask all but the `kept` [B, Q, 1] largest, of equal ones those of lower id; rows with neither setting stay."""
    least = descending.gather(-1, kept - 1)
    room = (kept - (descending > least).sum(-1, keepdim=True)).int()  # for tokens equal to the least
    equal = logits == least
    off = ((top_k >= logits.shape[-1]) & top_p.isinf())[:, None, None]
    keep = (logits > least).logical_or_(equal.logical_and_(equal.cumsum(-1, dtype=torch.int32) <= room))
    return logits.masked_fill(keep.logical_or_(off).logical_not_(), float("-inf"))


_IMPLEMENTATIONS = {"torch": top_k_top_p_ref, "triton": top_k_top_p_triton}


def top_k_top_p(
    logits: Tensor, top_k: Tensor, top_p: Tensor, *, max_top_k: int, any_top_p: bool, any_top_p_alone: bool
) -> Tensor:
    """The masked logits, a new tensor.

    Host knowledge: max_top_k, the largest top_k that is on (0: none is); any_top_p; any_top_p_alone: in a row without
    top_k. Which of equal masses crosses p first is up to rounding.
    """
    run = _IMPLEMENTATIONS[backend(logits, _IMPLEMENTATIONS)]
    return run(logits, top_k, top_p, max_top_k, any_top_p, any_top_p_alone)


class Truncated(NamedTuple):
    """Processed logits [B, Q, vocab] but for what kernels do as they read them: the division by divisor [B], and the
    cut; None where nothing is left to do."""

    logits: Tensor
    divisor: Tensor | None = None
    cut: Cut | None = None

    def processed(self) -> Tensor:
        """All of it done: float64 or float32 [B, Q, vocab]."""
        if self.cut is not None:
            return cut_logits(self.logits, self.divisor, self.cut)
        return divided(self.logits, None if self.divisor is None else self.divisor[:, None])


def truncate_ref(
    logits: Tensor,
    divisor: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
    max_top_k: int,
    any_top_p: bool,
    any_top_p_alone: bool,
) -> Truncated:
    x = Truncated(logits, divisor).processed()
    return Truncated(top_k_top_p_ref(x, top_k, top_p, max_top_k, any_top_p, any_top_p_alone))


def truncate_triton(
    logits: Tensor,
    divisor: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
    max_top_k: int,
    any_top_p: bool,
    any_top_p_alone: bool,
) -> Truncated:
    cut = find_cut(logits, divisor, top_k, top_p, max_top_k, any_top_p, any_top_p_alone)
    return Truncated(logits, divisor, cut)


_TRUNCATE = {"torch": truncate_ref, "triton": truncate_triton}


def truncate(
    logits: Tensor,
    divisor: Tensor | None,
    top_k: Tensor,
    top_p: Tensor,
    *,
    max_top_k: int,
    any_top_p: bool,
    any_top_p_alone: bool,
) -> Truncated:
    """`top_k_top_p` of logits / divisor, for those who sample next: the reference masks, on the GPU the vocabulary is
    only read and the answer is a Cut. logits of any float dtype, dense in the vocabulary."""
    run = _TRUNCATE[backend(logits, _TRUNCATE)]
    return run(logits, divisor, top_k, top_p, max_top_k, any_top_p, any_top_p_alone)
