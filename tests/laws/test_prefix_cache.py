"""Law: what the prefix cache holds changes no token, and no adapter is served another's blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lawbook.cases import Case, law_cases
from lawbook.engines import run, script_of, tokens
from lawbook.mixes import Ask, asks, prompt, speculating
from lawbook.plain import Plain
from specserve.llm import LLM

SHARED = prompt(50, 32)  # four blocks of 8


def sharing(batch: list[Ask]) -> list[Ask]:
    """Every prompt begins alike; some are the shared part itself, whole blocks to the last token."""
    return [replace(ask, prompt=SHARED + prompt(60 + index, 9)[: index % 3 * 4]) for index, ask in enumerate(batch)]


@law_cases()
def test_hits_change_nothing(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    batch = sharing(asks(case.mix, sampled=case.sampled))
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth))
    first = run(llm, speculating(batch, case))
    second = run(llm, speculating(batch, case))
    assert plain.judged(case.family, batch, tokens(first), truth) == truth
    assert plain.judged(case.family, batch, tokens(second), truth) == truth
    assert all(output.cached_tokens >= len(SHARED) - 8 for output in second)
