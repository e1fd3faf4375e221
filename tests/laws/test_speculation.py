"""Law: speculation changes no token, whoever drafts and however it is verified."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec.structs import replace as with_fields

from lawbook.cases import DEPTHS, MODES, PROPOSERS, Case, cases, law_cases
from lawbook.engines import HERE, another_number, requests, run, run_steps, script_of, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM, Output


def check_drafting(case: Case, outputs: list[Output]) -> None:
    """That the law was not held by drafting nothing."""
    drafted = sum(output.speculation.drafted for output in outputs)
    accepted = sum(output.speculation.accepted for output in outputs)
    assert drafted > 0
    if case.proposer == "oracle" and HERE.exact:
        assert accepted == drafted
    if case.proposer == "wrong":
        assert accepted == 0


@law_cases()
def test_same_tokens_with_and_without(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    batch = asks(case.mix, sampled=case.sampled)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth))
    outputs = run(llm, speculating(batch, case))
    assert plain.judged(case.family, batch, tokens(outputs), truth) == truth
    if case.proposer == "suffix" and not any(output.speculation.drafted for output in outputs):
        outputs = run(llm, speculating(batch, case))  # nothing in these texts stood there before; now all of it did
        assert plain.judged(case.family, batch, tokens(outputs), truth) == truth
    check_drafting(case, outputs)


@cases(
    dict(proposer=PROPOSERS, mode=MODES, depth=DEPTHS),
    cover=[(proposer, MODES[i % 3], DEPTHS[i % 2]) for i, proposer in enumerate(PROPOSERS)],
)
def test_same_tokens_with_another_number_every_step(
    proposer: str, mode: str, depth: int, plain: Plain, open_case: Callable[..., LLM]
) -> None:
    """0 to 8 drafts, row by row and step by step, while requests take each other's blocks; then found in the cache."""
    case = Case("llama", proposer, mode, depth, "summed")
    batch = asks(case.mix, sampled=case.sampled, length=34)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth), num_blocks=12, max_model_len=64)
    for _ in range(2):
        answers = run_steps(llm, requests(speculating(batch, case, num_drafts=4)), between=another_number(llm))
        ours = [answers[str(index)] for index in range(len(batch))]
        assert plain.judged(case.family, batch, ours, truth) == truth
    stats = llm.engine.stats()
    assert stats.preemptions > 0 and stats.num_draft_tokens > 0 and stats.prefix_hits > 0


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("proposer", ["near_draft", "ngram", "random"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.usefixtures("exact")
def test_same_logprobs_with_and_without(family: str, proposer: str, depth: int, open_case: Callable[..., LLM]) -> None:
    case = Case(family, proposer, "sampled-coupled", depth, "distinct")
    batch = [replace(ask, params=with_fields(ask.params, logprobs=3)) for ask in asks(case.mix, sampled=True)]
    llm = open_case(case)
    without, drafted = run(llm, batch), run(llm, speculating(batch, case))
    check_drafting(case, drafted)
    for ours, expected in zip(drafted, without, strict=True):
        assert ours.logprobs is not None and expected.logprobs is not None
        assert [entry.token_id for entry in ours.logprobs] == ours.token_ids
        for entry, other in zip(ours.logprobs, expected.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-9)
            assert [token for token, _ in entry.top] == [token for token, _ in other.top]
            assert [value for _, value in entry.top] == pytest.approx([value for _, value in other.top], abs=1e-9)
