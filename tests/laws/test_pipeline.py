"""Law: a pipeline two steps deep gives what one step at a time gives, also when requests come and go meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lawbook.cases import Case, law_cases
from lawbook.engines import requests, run_steps
from lawbook.mixes import asks, speculating
from lawbook.plain import Plain
from specserve.llm import LLM


@law_cases(depth=(2,))
def test_other_depth_is_same(case: Case, plain: Plain, open_case: Callable[..., LLM]) -> None:
    """Both depths without an oracle's script: the fakes that need one draft nothing, the others as always."""
    batch = asks(case.mix, sampled=case.sampled)
    arrivals = requests(speculating(batch, case))
    leaving = {4: "1", 9: "4"}

    def answers(depth: int) -> dict[str, tuple[int, ...]]:
        llm = open_case(replace(case, depth=depth), max_num_seqs=3, max_num_batched_tokens=40)
        return run_steps(
            llm,
            arrivals,
            every=2,
            between=lambda step: llm.engine.abort_requests([leaving[step]] if step in leaving else []),
        )

    one, other = answers(1), answers(2)
    assert set(one) == set(other)
    stay = [index for index in range(len(batch)) if str(index) not in leaving.values()]
    truth, ours = ([texts[str(index)] for index in stay] for texts in (one, other))
    assert plain.judged(case.family, [batch[index] for index in stay], ours, truth) == truth
    assert sum(map(len, one.values())) > len(one)
