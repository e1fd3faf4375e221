"""Speculative decoding samples the target's own distribution: χ² over 10⁵ samples of a Markov chain, and over 10⁶ where
there is time. Tokens one, one and two, one to three jointly must be distributed as the target's. The same test rejects
wrong ways to verify, which shows that it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lawbook.chains import (
    MANY,
    P_VALUE,
    PARAMS,
    POSITION,
    SAMPLES,
    START,
    VOCAB,
    Setting,
    chains,
    generate,
    p_values,
    p_values_of_many,
    speculate,
)  # fmt: skip
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.rejection import Verified, residual_logits, verify
from specserve_kernels.sampling.tokens import gumbel_argmax


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_drafts", [0, 1, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_equals_the_targets_distribution(params: str, num_drafts: int, is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS[params]), num_drafts, is_coupled)
    assert min(p_values(setting, generate(setting))) > P_VALUE


@pytest.mark.slow
@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_drafts", [1, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_a_million_samples(params: str, num_drafts: int, is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS[params]), num_drafts, is_coupled, ragged=num_drafts > 1)
    assert min(p_values_of_many(setting, MANY)) > P_VALUE


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


def cut_if(is_bad: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Verified]:
    """`verify`, but of only the drafts before the first bad one: `is_bad(p, q [B, K, V], drafts [B, K, 1])`."""

    def biased(processed, drafts, counts, q, *rest, **flags):  # type: ignore[no-untyped-def]
        bad = is_bad(processed[:, :-1].softmax(-1), q, drafts.unsqueeze(2)).squeeze(2)
        return verify(processed, drafts, torch.minimum(counts, (bad.cumsum(1) == 0).sum(1)), q, *rest, **flags)

    return biased


def typical(processed, drafts, counts, q, *rest, **flags):  # type: ignore[no-untyped-def]
    """`verify`, but a draft that the target finds likely is accepted (as Medusa's typical acceptance does)."""
    verified = verify(processed, drafts, counts, q, *rest, **flags)
    likely = processed[:, :-1].softmax(-1).gather(2, drafts.unsqueeze(2)).squeeze(2) > 0.3
    accepted = (likely | (drafts == verified.tokens[:, :-1])).cumprod(1).sum(1)
    own = torch.arange(drafts.shape[1]) >= accepted[:, None]
    tokens = torch.cat((torch.where(own, verified.tokens[:, :-1], drafts), verified.tokens[:, -1:]), dim=1)
    return Verified(tokens, accepted + 1, accepted)


def wrong_settings() -> dict[str, Setting]:
    target, draft = chains(PARAMS["top_p"])
    _, unprocessed = chains(PARAMS["plain"])
    right = Setting(target, draft, 2, is_coupled=False)
    return {
        "no residual": replace(right, verify=replace_last(from_target)),
        "residual with the draft's noise": replace(right, verify=replace_last(residual_with_the_drafts_noise)),
        "q before its processors": replace(right, claimed_q=unprocessed.softmax(-1)),
        "an illegal draft is cut": replace(right, verify=cut_if(lambda p, q, d: p.gather(2, d) == 0)),
        "an unsure draft is cut": replace(right, verify=cut_if(lambda p, q, d: q.gather(2, d) < 0.3)),
        "coupled, typical drafts accepted": replace(right, is_coupled=True, verify=typical),
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
