"""Law: with `coupled`, a seed's text is the same for every number of drafts, every proposer, and in any batch.

Source of the method: Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant speculative
decoding", 2024. The noise is keyed by (seed, position, token id), so the target's own sample is what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec.structs import replace as with_fields

from lawbook.cases import FAMILIES, PROPOSERS, Case, cases, over
from lawbook.engines import requests, run, run_steps, script_of, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM

NUM_CHOICES = 9  # 0 to 8 drafts


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


@cases(
    dict(family=FAMILIES, proposer=PROPOSERS, shift=range(NUM_CHOICES)),
    cover=[("llama", proposer, shift) for shift, proposer in enumerate(PROPOSERS)],
)
def test_a_crowd_with_every_number_of_drafts(
    family: str, proposer: str, shift: int, plain: Plain, open_case: Callable[..., LLM]
) -> None:
    """64 requests at once, each adapter among them, that draft 0 to 8 tokens side by side; and one of them alone."""
    case = Case(family, proposer, "sampled-coupled", 2, "distinct")
    batch = asks(case.mix, sampled=True, count=64, num_new=16)
    truth = plain.answers(family, batch)
    llm = open_case(case, script_of(batch, truth), max_num_seqs=64, max_model_len=64, num_blocks=64 * 8 + 1)
    crowd = [speculating([ask], case, (index + shift) % NUM_CHOICES)[0] for index, ask in enumerate(batch)]
    assert plain.judged(family, batch, tokens(run(llm, crowd)), truth) == truth
    one = shift * 7
    assert plain.judged(family, batch[one : one + 1], tokens(run(llm, [crowd[one]])), [truth[one]]) == [truth[one]]
    stats = llm.engine.stats()
    assert stats.num_draft_tokens > 64
    assert case.proposer == "oracle" or stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_another_seed_another_text(family: str, plain: Plain) -> None:
    """The law above would hold for an engine that ignores the seed."""
    ask = asks("base", sampled=True)[0]
    batch = [replace(ask, params=with_fields(ask.params, seed=seed)) for seed in range(20)]
    assert len(set(plain.answers(family, batch))) == len(batch)
