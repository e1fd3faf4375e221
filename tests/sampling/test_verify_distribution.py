"""Speculative decoding samples the target's own distribution: χ² over 10⁵ samples of a Markov chain.

Target and draft are two chains over 8 tokens. Every sample is a row with its own seed and generates three tokens, in as
many rounds of drafting and verification as it takes. Tokens one, one and two, one to three jointly must be distributed
as the target's. The same test rejects wrong ways to verify, which shows that it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from specserve.core.sampling_params import SamplingParams
from specserve.sampling.processors import process
from specserve.sampling.rows import SamplingRows
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.rejection import Verified, residual_logits, verify
from specserve_kernels.sampling.tokens import draft_sample, gumbel_argmax

VOCAB = 8
SAMPLES = 100_000
LENGTH = 3
START = 2  # the known token before the first
POSITION = 1000  # of the first token
P_VALUE = 1e-4

PARAMS = {
    "plain": SamplingParams(),
    "top_p": SamplingParams(temperature=1.3, top_p=0.75),
    "top_k_min_p": SamplingParams(temperature=0.6, top_k=5, min_p=0.02),
}


@dataclass(frozen=True)
class Setting:
    """Two chains as processed logits [V, V] of the next token given the last, and how to speculate."""

    target: Tensor
    draft: Tensor
    num_drafts: int
    is_coupled: bool
    one_hot: bool = False  # the draft's favourite token instead of a draw
    ragged: bool = False
    claimed_q: Tensor | None = None  # [V, V], told to verification instead of the truth
    verify: Callable[..., Verified] = verify


def chains(params: SamplingParams, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Processed logits of target and draft."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(VOCAB, VOCAB, generator=generator, dtype=dtype) * 1.2
    draft = target + torch.randn(VOCAB, VOCAB, generator=generator, dtype=dtype)
    rows = SamplingRows(1, VOCAB, "cpu", dtype)
    rows.set_row(0, params, seed=0, stop_ids=(), prompt_len=1)
    batch, no_drafts = rows.gather([0] * VOCAB), torch.zeros(VOCAB, 0, dtype=torch.int64)
    processed = [process(logits[:, None], batch, no_drafts)[:, 0] for logits in (target, draft)]
    return processed[0], processed[1]


def speculate(setting: Setting, last: Tensor, seed: Tensor, position: Tensor) -> Verified:
    """One round of every row: `last` is its last known token, `position` that of the next."""
    num_rows, temperature = len(last), torch.ones(len(last))
    is_coupled = torch.full((num_rows,), setting.is_coupled)
    context, probs = [last], []
    for step in range(setting.num_drafts):
        logits = setting.draft[context[-1]]
        if setting.one_hot:
            token = logits.argmax(-1)
        else:
            token, q = draft_sample(logits, seed, position + step, temperature, is_coupled)
            assert q is not None
            probs.append(q if setting.claimed_q is None else setting.claimed_q[context[-1]])
        context.append(token)
    processed = setting.target[torch.stack(context, 1)]  # [B, K+1, V]
    drafts = torch.stack(context, 1)[:, 1:]
    counts = torch.full((num_rows,), setting.num_drafts)
    if setting.ragged:
        counts = (seed * 7919 + position) % (setting.num_drafts + 1)
        junk = torch.where(seed % 2 == 0, -7, VOCAB + 99)[:, None]
        drafts = drafts.where(torch.arange(setting.num_drafts) < counts[:, None], junk)
    draft_probs = torch.stack(probs, 1) if probs else None
    flags = {"any_coupled": setting.is_coupled, "any_rejection": not setting.is_coupled}
    return setting.verify(processed, drafts, counts, draft_probs, seed, position, temperature, is_coupled, **flags)


def generate(setting: Setting, num_rows: int = SAMPLES, length: int = LENGTH, first_seed: int = 0) -> Tensor:
    """The first `length` tokens of every row. [B, length]"""
    seed = torch.arange(first_seed, first_seed + num_rows)
    tokens = torch.zeros(num_rows, length + setting.num_drafts + 1, dtype=torch.int64)
    done = torch.zeros(num_rows, dtype=torch.int64)
    last = torch.full((num_rows,), START)
    while int(done.min()) < length:
        rows = torch.nonzero(done < length).squeeze(1)
        verified = speculate(setting, last[rows], seed[rows], POSITION + done[rows])
        index = done[rows, None] + torch.arange(setting.num_drafts + 1)
        tokens[rows[:, None], index] = verified.tokens  # what is not committed is overwritten by the next round
        last[rows] = verified.tokens.gather(1, verified.num_accepted[:, None]).squeeze(1)
        done[rows] += verified.num_tokens
    return tokens[:, :length]


def p_values(setting: Setting, tokens: Tensor) -> list[float]:
    """χ² of the first 1, 2, … tokens jointly against the target chain's own probabilities."""
    transition = setting.target.double().softmax(-1).numpy()
    expected, code, result = np.ones(1), np.zeros(len(tokens), dtype=np.int64), []
    for column in range(tokens.shape[1]):
        last = np.arange(len(expected)) % VOCAB if column else np.array([START])
        expected = (expected[:, None] * transition[last]).ravel()
        code = code * VOCAB + tokens[:, column].numpy()
        observed = np.bincount(code, minlength=len(expected))
        result.append(chi_square(observed, expected * len(tokens)))
    return result


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The p-value; cells that expect under 5 are one cell, and what is impossible must not happen."""
    assert observed[expected == 0].sum() == 0, "an impossible token was sampled"
    small = (expected < 5) & (expected > 0)
    large = expected >= 5
    observed = np.append(observed[large], observed[small].sum())
    expected = np.append(expected[large], expected[small].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep] * (observed.sum() / expected.sum())).pvalue)


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_equals_the_targets_distribution(params: str, num_drafts: int, is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS[params]), num_drafts, is_coupled)
    assert min(p_values(setting, generate(setting))) > P_VALUE


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
@pytest.mark.parametrize(
    "change",
    [{"one_hot": True}, {"ragged": True}, {"one_hot": True, "ragged": True}],
    ids=["one_hot", "ragged", "one_hot_ragged"],
)
def test_one_hot_and_ragged_drafts(change: dict[str, bool], is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS["top_p"]), 4, is_coupled, **change)
    assert min(p_values(setting, generate(setting))) > P_VALUE


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
def test_float32(is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS["top_k_min_p"], torch.float32), 4, is_coupled)
    assert min(p_values(setting, generate(setting))) > P_VALUE


def replace_last(draw: Callable[..., Tensor]) -> Callable[..., Verified]:
    """`verify`, but after a rejection the token is what `draw(p logits, q, seed, position, temperature)` says."""

    def biased(processed, drafts, counts, q, seed, first, temperature, is_coupled, **flags):  # type: ignore[no-untyped-def]
        verified = verify(processed, drafts, counts, q, seed, first, temperature, is_coupled, **flags)
        row, at = torch.arange(len(seed)), verified.num_accepted
        q_at = q[row, at.clamp(max=drafts.shape[1] - 1)]
        other = draw(processed[row, at], q_at, seed, first + at, temperature)
        tokens = verified.tokens.clone()
        tokens[row, at] = torch.where(at < counts, other, tokens[row, at])
        return verified._replace(tokens=tokens)

    return biased


def from_target(logits: Tensor, q: Tensor, seed: Tensor, position: Tensor, temperature: Tensor) -> Tensor:
    return gumbel_argmax(logits, seed, position, temperature, Stream.RESIDUAL)


def residual_with_the_drafts_noise(
    logits: Tensor, q: Tensor, seed: Tensor, position: Tensor, temperature: Tensor
) -> Tensor:
    return gumbel_argmax(residual_logits(logits.softmax(-1), q), seed, position, temperature, Stream.DRAFT)


def wrong_settings() -> dict[str, Setting]:
    target, draft = chains(PARAMS["top_p"])
    _, unprocessed = chains(PARAMS["plain"])
    right = Setting(target, draft, 2, is_coupled=False)
    return {
        "no residual": replace(right, verify=replace_last(from_target)),
        "residual with the draft's noise": replace(right, verify=replace_last(residual_with_the_drafts_noise)),
        "q before its processors": replace(right, claimed_q=unprocessed.softmax(-1)),
        "coupled, fresh noise after a mismatch": replace(right, is_coupled=True, verify=replace_last(from_target)),
    }


@pytest.mark.parametrize("name", wrong_settings())
def test_rejects_a_wrong_verification(name: str) -> None:
    setting = wrong_settings()[name]
    assert min(p_values(setting, generate(setting))) < P_VALUE


def first_acceptance(setting: Setting) -> float:
    seed = torch.arange(SAMPLES)
    verified = speculate(setting, torch.full_like(seed, START), seed, torch.full_like(seed, POSITION))
    return (verified.num_accepted > 0).double().mean().item()


@pytest.mark.parametrize("params", PARAMS)
def test_acceptance(params: str) -> None:
    """Rejection: 1 − TV. Coupled: between (1 − TV) / (1 + TV) and 1 − TV. One-hot: p(d)."""
    target, draft = chains(PARAMS[params])
    p, q = target[START].softmax(-1), draft[START].softmax(-1)
    distance = 0.5 * (p - q).abs().sum().item()
    slack = 4 * 0.5 / SAMPLES**0.5
    assert 0.05 < distance < 0.9
    assert first_acceptance(Setting(target, draft, 1, False)) == pytest.approx(1 - distance, abs=slack)
    coupled = first_acceptance(Setting(target, draft, 1, True))
    assert (1 - distance) / (1 + distance) - slack < coupled < 1 - distance + slack
    for is_coupled in (True, False):
        one_hot = first_acceptance(Setting(target, draft, 1, is_coupled, one_hot=True))
        assert one_hot == pytest.approx(p[q.argmax()].item(), abs=slack)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coupled_text_is_the_same_with_any_drafts(dtype: torch.dtype) -> None:
    target, draft = chains(PARAMS["top_p"], dtype)
    few = {"num_rows": 100, "length": 12}
    plain = generate(Setting(target, draft, 0, True), **few)
    assert len(plain.unique(dim=0)) == 100
    assert torch.equal(generate(Setting(target, draft, 0, False), **few), plain)
    others = [{"one_hot": True}, {"ragged": True}, {"draft": target}, {"draft": draft.roll(1, 1)}]
    for num_drafts in range(1, 9):
        for change in ({}, others[num_drafts % 4]):
            setting = replace(Setting(target, draft, num_drafts, True), **change)
            assert torch.equal(generate(setting, **few), plain)


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
def test_the_target_as_its_own_draft_is_always_accepted(is_coupled: bool) -> None:
    target, _ = chains(PARAMS["top_p"], torch.float32)
    seed = torch.arange(20_000)
    verified = speculate(Setting(target, target, 4, is_coupled), seed % VOCAB, seed, seed % 77)
    assert (verified.num_accepted == 4).all()
