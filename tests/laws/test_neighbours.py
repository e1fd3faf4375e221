"""Law: what happens to others changes nothing: aborts at any moment, adapters reloaded under a running request."""

from __future__ import annotations

from collections.abc import Callable

from lawbook.cases import Case, law_cases
from lawbook.engines import requests, run_steps, script_of
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from lawbook.zoo import ADAPTERS, Zoo
from specserve.core.messages import LoadAdapter
from specserve.llm import LLM


@law_cases()
def test_aborts_disturb_nobody(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    batch = asks(case.mix, sampled=case.sampled)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth))
    aborts = {1: "5", 3: "0", 4: "3"}  # step → request: prefilling, decoding, with a step in flight at depth 2
    arrivals = requests(speculating(batch, case))
    answers = run_steps(
        llm, arrivals, between=lambda step: llm.engine.abort_requests([aborts[step]] if step in aborts else [])
    )
    ours = [answers[str(index)] for index in range(len(batch))]
    cut = [text[: len(ours[i])] if str(i) in aborts.values() else text for i, text in enumerate(truth)]
    assert plain.judged(case.family, batch, ours, cut) == cut
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, stats.num_blocks)


@law_cases()
def test_reloads_disturb_nobody(
    case: Case, plain: Plain, zoo: Callable[[str], Zoo], open_case: Callable[..., LLM]
) -> None:
    """While requests run, every name is reloaded with another adapter's folder: they finish on what they began with."""
    batch = asks(case.mix, sampled=case.sampled)
    truth = plain.answers(case.family, batch)
    llm = open_case(case, script_of(batch, truth))
    folders = list(zoo(case.family).adapters["near" if case.proposer != "narrow_draft" else "narrow"].values())

    def reload(step: int) -> None:
        if step == 2:
            for call_id, name in enumerate(ADAPTERS):
                llm.engine.handle(LoadAdapter(call_id=call_id, name=name, path=str(folders[call_id - 1]), replace=True))

    answers = run_steps(llm, requests(speculating(batch, case)), between=reload)
    ours = [answers[str(index)] for index in range(len(batch))]
    assert plain.judged(case.family, batch, ours, truth) == truth
