"""The pair has the agreement that it promises, and decodes along its permutation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.engines import Mode, Setup, open_engine
from benchmarks.pair import permutations
from benchmarks.shapes import load_settings


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
def test_permutations_agree_on_a_share(alpha: float) -> None:
    target, draft = permutations(1000, alpha, seed=3)
    assert target.sort().values.equal(torch.arange(1000))
    assert draft.sort().values.equal(torch.arange(1000))
    assert (target == draft).float().mean().item() == pytest.approx(alpha)


def test_drafts_are_accepted_with_probability_alpha(pair: Path) -> None:
    engine = open_engine("specserve", Setup(pair, Mode(0, 4), "cpu", "float32"))
    vocab = load_settings(pair).shape("target").vocab
    successor, _ = permutations(vocab, 0.8, load_settings(pair).seed)
    prompts = [[(37 * i + 11 * j) % vocab for j in range(8)] for i in range(32)]
    try:
        outputs = engine.generate(prompts, [None] * 32, 48)
        facts = engine.facts()
    finally:
        engine.close()
    for prompt, tokens in zip(prompts, outputs, strict=True):
        for before, after in zip([prompt[-1], *tokens], tokens, strict=False):
            assert after == successor[before]
    assert facts["accepted_first"] == pytest.approx(0.8, abs=0.06)
    assert facts["tokens_per_round"] == pytest.approx(1 + 0.8 + 0.8**2 + 0.8**3 + 0.8**4, abs=0.35)
