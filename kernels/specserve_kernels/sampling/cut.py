"""What top_k and top_p leave of a row, in four numbers beside its logits, so that nothing of the vocabulary's size is
written.

With x = logit / divisor, a token stays if x > threshold, or x = threshold and its id ≤ last_id. Its probability is
exp(x − largest) / total, where largest = max x and total = Σ exp(x − largest) over the tokens that stay; everybody
else's is 0. Every kernel computes it by these operations in this order, so that equal logits with equal numbers have
bitwise equal probabilities: q of a draft is exactly what the draft was drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specserve_kernels.language import tl, triton
from specserve_kernels.sampling.softmax_parts import probability


class Cut(NamedTuple):
    """Of [B, Q] rows of logits: threshold (−inf: all stay), largest, total float32; last_id int32; all dense."""

    threshold: Tensor
    last_id: Tensor
    largest: Tensor
    total: Tensor


@dataclass(frozen=True, slots=True)
class DraftSoftmax:
    """What K drafts of each row were drawn from: logits [B, K, vocab] float, as the model gave them where no processor
    changes them; divisor [B] or None.

    A total of 0 stands for a draft that its proposer is sure of: whatever the logits, its probability is 1.
    """

    logits: Tensor
    divisor: Tensor | None
    cut: Cut

    def probs(self, drafts: Tensor) -> Tensor:
        """Written out for `drafts` [B, K] int64: [B, K, vocab] float32."""
        kept = cut_logits(self.logits, self.divisor, self.cut)
        q = (kept - self.cut.largest[..., None]).exp() / self.cut.total[..., None]
        sure = torch.zeros_like(q).scatter_(-1, drafts[..., None], 1.0)
        return torch.where((self.cut.total == 0)[..., None], sure, q)


def cut_logits(logits: Tensor, divisor: Tensor | None, cut: Cut) -> Tensor:
    """logits [B, Q, vocab], divided and masked: float32, −inf where a token does not stay."""
    x = logits.float() if divisor is None else logits.float() / divisor[:, None, None]
    token = torch.arange(x.shape[-1], device=x.device)
    threshold = cut.threshold[..., None]
    stays = (x > threshold) | ((x == threshold) & (token <= cut.last_id[..., None]))
    return x.masked_fill(~stays, float("-inf"))


@triton.jit
def load_logits(logits, at, inside, divisor, row, DIVIDED: tl.constexpr):
    """float32 x of the elements `at`, −inf outside."""
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    if DIVIDED:
        x = divide(x, tl.load(divisor + row).to(tl.float32))
    return x


@triton.jit
def divide(x, divisor):
    """x / divisor, correctly rounded, by one division a program: what the reciprocal gives is corrected twice, by
    remainders that a fused multiplication knows exactly (Markstein 1990)."""
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = x * reciprocal
    near = tl.fma(tl.fma(-quotient, divisor, x), reciprocal, quotient)
    exact = tl.fma(tl.fma(-near, divisor, x), reciprocal, near)
    return tl.where(tl.abs(x) == float("inf"), x, exact)


@triton.jit
def stays(x, token, threshold, last_id):
    return (x > threshold) | ((x == threshold) & (token <= last_id))


@triton.jit
def cut_off(x, token, thresholds, last_ids, place):
    """x, −inf where a token does not stay; place: of the row among [B, Q]."""
    return tl.where(stays(x, token, tl.load(thresholds + place), tl.load(last_ids + place)), x, float("-inf"))


@triton.jit
def drafted_probability(
    logits, divisor, thresholds, last_ids, largest, totals,
    at, inside, place, there, row, token, draft, DIVIDED: tl.constexpr,
):  # fmt: skip
    """q of `token`, at the elements `at` of DraftSoftmax.logits, 0 outside; place: of the draft, if it is there."""
    x = load_logits(logits, at, inside, divisor, row, DIVIDED)
    total = tl.load(totals + place, mask=there, other=1.0)
    threshold = tl.load(thresholds + place, mask=there, other=0.0)
    x = tl.where(stays(x, token, threshold, tl.load(last_ids + place, mask=there, other=0)), x, float("-inf"))
    q = probability(x, tl.load(largest + place, mask=there, other=0.0), tl.where(total == 0.0, 1.0, total))
    return tl.where(total == 0.0, tl.where(token == draft, 1.0, 0.0), q)
