"""Law: many adapters in one batch give each request what it gets alone, and what the merged weights give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lawbook.cases import FAMILIES, MIXES, Case, law_cases
from lawbook.engines import open_engine, requests, run, run_steps, script_of, tokens
from lawbook.mixes import LORAS, asks, speculating
from lawbook.oracles import save_merged
from lawbook.plain import Plain
from lawbook.zoo import ADAPTERS, Zoo
from specserve.core.messages import LoraRef
from specserve.llm import LLM


@law_cases()
def test_batched_is_alone(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    """Requests arrive every other step, in reverse, for fewer rows than there are requests."""
    batch = asks(case.mix, sampled=case.sampled)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth), max_num_seqs=4)
    arrivals = requests(speculating(batch, case))
    answers = run_steps(llm, arrivals[::-1], every=2)
    ours = [answers[request.request_id] for request in arrivals]
    assert plain.judged(case.family, batch, ours, truth) == truth


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "base"])
def test_batched_is_merged(
    family: str, mix: str, zoo: Callable[[str], Zoo], plain: Plain, open_case: Callable[..., LLM], tmp_path: Path
) -> None:
    """One batch over the mix, and one engine on merged weights for each request of it."""
    batch = asks(mix, sampled=False)
    ours = tokens(run(open_case(Case(family, "ngram", "greedy-coupled", 1, mix)), batch))
    merged: dict[str, tuple[int, ...]] = {}
    for index, lora in enumerate(LORAS[mix]):
        folder = save_merged(zoo(family), lora, tmp_path / str(index))
        llm = open_engine(zoo(family), model=str(folder), loras=())
        users = [ask for ask in batch if ask.lora == lora]
        for ask, answer in zip(users, tokens(run(llm, [replace(ask, lora=()) for ask in users])), strict=True):
            merged[repr(ask)] = answer
        llm.engine.close()
    truth = [merged[repr(ask)] for ask in batch]
    assert plain.judged(family, batch, ours, truth) == truth


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_changes_the_answer(family: str, plain: Plain) -> None:
    """Without this the laws above would hold for an engine that ignores adapters."""
    ask = asks("base", sampled=False)[0]
    loras = [(), *((LoraRef(name),) for name in ADAPTERS), (LoraRef("a1", 0.5),), (LoraRef("a1"), LoraRef("a2"))]
    answers = plain.answers(family, [replace(ask, lora=lora) for lora in loras])
    assert len(set(answers)) == len(answers)
