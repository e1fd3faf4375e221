"""What a draft was drawn from, told by logits and numbers instead of probabilities: samples follow the target."""

from __future__ import annotations

import torch
from scipy.stats import chisquare
from torch import Tensor

from specserve_kernels.sampling.cut import Cut, DraftSoftmax
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.rejection import verify_ref
from specserve_kernels.sampling.selection import top_k_top_p_ref
from specserve_kernels.sampling.tokens import gumbel_argmax_ref

ROWS, VOCAB, TEMPERATURE, TOP_P = 50_000, 8, 0.8, 0.85


def cut_of(logits: Tensor) -> tuple[Tensor, Cut]:
    """(masked logits, the numbers that mask them) of raw logits [1, Q, V]."""
    top_k, top_p = torch.tensor([VOCAB]), torch.tensor([TOP_P])
    masked = top_k_top_p_ref(logits.float() / TEMPERATURE, top_k, top_p, 0, True, True)
    largest = masked.amax(-1)
    total = (masked - largest[..., None]).exp().sum(-1)
    threshold = masked.masked_fill(masked.isinf(), torch.inf).amin(-1)
    return masked, Cut(threshold, torch.full(threshold.shape, VOCAB, dtype=torch.int32), largest, total)


def wide(cut: Cut) -> Cut:
    return Cut(*(numbers.expand(ROWS, -1) for numbers in cut))


def p_value(*, claim_no_cut: bool) -> float:
    generator = torch.Generator().manual_seed(11)
    target = (torch.randn(1, 2, VOCAB, generator=generator) * 1.5).bfloat16()
    draft = (target[:, :1] + torch.randn(1, 1, VOCAB, generator=generator)).bfloat16()
    (p_masked, p_cut), (q_masked, q_cut) = cut_of(target), cut_of(draft)
    assert p_masked.isinf().any() and q_masked.isinf().any()
    seed, position = torch.arange(ROWS) * 7919, torch.full((ROWS,), 5)
    temperature, divisor = torch.full((ROWS,), TEMPERATURE), torch.full((ROWS,), TEMPERATURE)
    drafts = gumbel_argmax_ref(q_masked.expand(ROWS, 1, VOCAB)[:, 0], seed, position, temperature, Stream.DRAFT)
    if claim_no_cut:
        scaled = draft.float() / TEMPERATURE
        total = (scaled - q_cut.largest[..., None]).exp().sum(-1)
        q_cut = q_cut._replace(threshold=torch.full_like(q_cut.threshold, -torch.inf), total=total)
    kept = DraftSoftmax(draft.expand(ROWS, 1, VOCAB), divisor, wide(q_cut))
    verified = verify_ref(
        target.expand(ROWS, 2, VOCAB), drafts[:, None], torch.ones_like(seed), kept, seed, position, temperature,
        torch.zeros(ROWS, dtype=torch.bool), divisor, wide(p_cut), any_coupled=False,
    )  # fmt: skip
    assert 0 < verified.num_accepted.sum() < ROWS
    found = torch.bincount(verified.tokens[:, 0], minlength=VOCAB).double()
    p = p_masked[0, 0].double().softmax(-1)
    assert found[p == 0].sum() == 0
    return float(chisquare(found[p > 0], p[p > 0] * ROWS).pvalue)


def test_samples_follow_the_target() -> None:
    assert p_value(claim_no_cut=False) > 1e-3


def test_a_q_without_its_cut_is_found_out() -> None:
    assert p_value(claim_no_cut=True) < 1e-7


def test_a_total_of_zero_is_a_sure_draft() -> None:
    logits = torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(2))
    masked, cut = cut_of(logits)
    divisor, draft = torch.tensor([TEMPERATURE]), torch.tensor([[3]])
    torch.testing.assert_close(DraftSoftmax(logits, divisor, cut).probs(draft), masked.softmax(-1))
    sure = DraftSoftmax(logits, divisor, cut._replace(total=torch.zeros(1, 1)))
    assert sure.probs(draft).tolist() == [[[float(token == 3) for token in range(VOCAB)]]]
