"""Law: a request that loses its blocks, or continues in another engine, says what it would have said undisturbed."""

from __future__ import annotations

from collections.abc import Callable

from lawbook.cases import Case, law_cases
from lawbook.engines import requests, run, run_steps, script_of, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM

MAX_MODEL_LEN = 64
TIGHT = 12  # blocks of 8 tokens: two requests find room for their prompts, not for their answers


@law_cases()
def test_preempted_is_undisturbed(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    batch = asks(case.mix, sampled=case.sampled, length=34)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth), num_blocks=TIGHT, max_model_len=MAX_MODEL_LEN)
    ours = tokens(run(llm, speculating(batch, case)))
    assert plain.judged(case.family, batch, ours, truth) == truth
    assert llm.engine.stats().preemptions > 0


@law_cases()
def test_resumed_is_undisturbed(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    """Each request continues from another point of its answer, the very beginning and the very end among them."""
    batch = asks(case.mix, sampled=case.sampled)
    truth = plain.answers(case.family, batch)
    cuts = [answer[: index * len(answer) // (len(truth) - 1)] for index, answer in enumerate(truth)]
    llm = open_case(case, script_of(batch, truth))
    answers = run_steps(llm, requests(speculating(batch, case), cuts))
    ours = [cut + answers[str(index)] for index, cut in enumerate(cuts)]
    assert plain.judged(case.family, batch, ours, truth) == truth
