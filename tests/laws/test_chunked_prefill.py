"""Law: a prompt computed in chunks, between other requests' tokens, is the prompt computed whole."""

from __future__ import annotations

from collections.abc import Callable

from lawbook.cases import Case, law_cases
from lawbook.engines import run, script_of, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM

BUDGET = 19  # tokens a step: several chunks a prompt, none of them a whole number of blocks


@law_cases()
def test_chunked_is_whole(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    batch = asks(case.mix, sampled=case.sampled, length=61)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth), max_num_batched_tokens=BUDGET)
    ours = tokens(run(llm, speculating(batch, case)))
    assert plain.judged(case.family, batch, ours, truth) == truth
    assert llm.engine.stats().steps > 7 * 61 // BUDGET
