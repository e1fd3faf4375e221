"""Law: with `coupled`, a seed's text is the same for every number of drafts, every proposer, and in any batch.

Source of the method: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding", 2024. The noise is keyed by (seed, position, token id), so the target's own sample is what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec.structs import replace as with_fields

from lawbook.cases import FAMILIES, PROPOSERS, Case, over
from lawbook.engines import requests, run, run_steps, script_of, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM


@over(family=FAMILIES, proposer=PROPOSERS, num_drafts=(0, 1, 4))
def test_same_seed_same_tokens(
    family: str, proposer: str, num_drafts: int, plain: Plain, open_case: Callable[..., LLM]
) -> None:
    """Together, alone, and in reverse while others are under way."""
    case = Case(family, proposer, "sampled-coupled", 2, "distinct")
    batch = asks(case.mix, sampled=True)
    truth = plain.answers(family, batch)
    llm = open_case(case, script_of(batch, truth))
    drafting = speculating(batch, case, num_drafts)
    together, alone = tokens(run(llm, drafting)), [tokens(run(llm, [ask]))[0] for ask in drafting]
    assert plain.judged(family, batch, together, truth) == truth
    assert plain.judged(family, batch, alone, truth) == truth
    answers = run_steps(llm, requests(drafting)[::-1], every=3)
    among = [answers[str(index)] for index in range(len(batch))]
    assert plain.judged(family, batch, among, truth) == truth


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_another_text(family: str, plain: Plain) -> None:
    """The law above would hold for an engine that ignores the seed."""
    ask = asks("base", sampled=True)[0]
    batch = [replace(ask, params=with_fields(ask.params, seed=seed)) for seed in range(20)]
    assert len(set(plain.answers(family, batch))) == len(batch)
