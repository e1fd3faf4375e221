"""Requests that leave the number of drafts to an engine that has measured its steps."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import replace

from specserve.core.sampling_params import NO_SPECULATION, SamplingParams
from specserve.llm import LLM
from specserve.scheduling.cost_table import CostTable
from specserve.scheduling.curve import Curve

Open = Callable[..., LLM]
PROMPTS = [[3 + (5 * row + index) % 50 for index in range(6)] for row in range(4)]


def test_steps_are_measured_when_the_first_request_needs_it(open_llm: Open) -> None:
    llm = open_llm()
    off = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30, speculation=NO_SPECULATION)
    plain = [output.token_ids for output in llm.generate(PROMPTS, off)]
    assert not llm.engine.scheduler.policy.models
    on = replace(off, speculation=SamplingParams().speculation)
    found = [output.token_ids for output in llm.generate(PROMPTS, on, lora=[None] * 4)]
    assert found == plain, "whatever was measured, and wherever the trials wrote"
    models = llm.engine.scheduler.policy.models
    assert set(models) == {False, True}
    assert all(model.table.verify and model.table.draft("draft_model", 1, 1) >= 0.0 for model in models.values())


def test_a_choice_changes_no_text_at_any_depth(open_llm: Open) -> None:
    """Drafts are said to be free, so that they are made; the number changes while estimates settle."""
    asks = [SamplingParams(temperature=t, seed=s, ignore_eos=True, max_tokens=30) for t, s in ((0.0, 1), (0.9, 2)) * 2]
    for depth in (1, 2):
        llm = open_llm(pipeline_depth=depth)
        flat = Curve([(1, 1000.0)])
        llm.engine.scheduler.policy.install(CostTable(decode=flat, verify=[(1, flat), (4, flat)]))
        outputs = llm.generate(PROMPTS, asks)
        assert all(output.speculation.drafted > 0 for output in outputs)
        plain = llm.generate(PROMPTS, [replace(ask, speculation=NO_SPECULATION) for ask in asks])
        assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
        stats = llm.engine.stats()
        assert stats.draft_length > 0 and stats.step_cost_ratio != 1.0
