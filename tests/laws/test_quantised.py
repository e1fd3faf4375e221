"""Law: speculation changes no token, however weights are kept: a quantised draft drafts for the plain target, and a
quantised target is its own truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lawbook.cases import DEPTHS, MODES, Case, over
from lawbook.engines import run, tokens
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM

KINDS = ("fp8", "int8")


def check_drafting(drafted: int, accepted: int) -> None:
    """Some drafts were right, some were not: both ways of a round were taken."""
    assert 0 < accepted < drafted


@over(kind=KINDS, family=("llama", "qwen2"), mode=MODES, depth=DEPTHS, mix=("distinct", "summed"))
@pytest.mark.usefixtures("exact")
def test_a_quantised_draft_changes_no_token(
    kind: str, family: str, mode: str, depth: int, mix: str, plain: Plain, open_case: Callable[..., LLM]
) -> None:
    case = Case(family, "near_draft", mode, depth, mix)
    batch = asks(mix, sampled=case.sampled)
    outputs = run(open_case(case, draft_quantization=kind), speculating(batch, case))
    assert tokens(outputs) == plain.answers(family, batch)
    stats = [output.speculation for output in outputs]
    check_drafting(sum(s.drafted for s in stats), sum(s.accepted for s in stats))


@over(kind=KINDS, family=("llama", "qwen2"), mode=MODES, depth=DEPTHS)
@pytest.mark.usefixtures("exact")
def test_a_quantised_target_says_the_same_with_drafts(
    kind: str, family: str, mode: str, depth: int, plain: Plain, open_case: Callable[..., LLM]
) -> None:
    case = Case(family, "near_draft", mode, depth, "distinct")
    batch = asks(case.mix, sampled=case.sampled)
    llm = open_case(case, quantization=kind)
    without, outputs = run(llm, batch), run(llm, speculating(batch, case))
    assert tokens(outputs) == tokens(without)
    assert tokens(without) != plain.answers(family, batch)  # it is quantised indeed
    stats = [output.speculation for output in outputs]
    check_drafting(sum(s.drafted for s in stats), sum(s.accepted for s in stats))
