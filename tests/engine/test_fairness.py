"""Who gets a step's tokens: nobody's drafts take a neighbour's token or keep a prompt out, no adapter's flood keeps
another's requests waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from lawbook.fakes import fakes
from specserve.core.messages import AddRequest, LoraRef
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM
from specserve.scheduling.cost_table import CostTable
from specserve.scheduling.curve import Curve

Open = Callable[..., LLM]


def add(llm: LLM, name: str, prompt_len: int, drafts: int, proposer: str, max_tokens: int = 30) -> None:
    speculation = SpeculationParams(num_draft_tokens=drafts, proposer=proposer) if drafts else NO_SPECULATION
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, speculation=speculation)
    prompt = [3 + index % 50 for index in range(prompt_len)]
    llm.engine.add_request(AddRequest(request_id=name, prompt_ids=prompt, params=params, seed=0))


def step_until(llm: LLM, num_decoding: int) -> None:
    """Until so many requests decode."""
    for _ in range(200):
        if sum(not request.prefilling for request in llm.engine.scheduler.running) == num_decoding:
            return
        llm.engine.step()
    raise AssertionError("a prompt never got its turn")


def step_names(llm: LLM) -> set[str]:
    """Requests that the next step gives tokens to."""
    return {output.request_id for output in llm.engine.step() if output.token_ids}


@pytest.mark.parametrize("budget", [4, 5, 9])
@pytest.mark.parametrize("proposer", ["random", "draft_model"])
def test_every_decode_row_moves_every_step(budget: int, proposer: str, open_llm: Open) -> None:
    """Drafts, and the draft model's catching up on long prompts, leave each row its token."""
    llm = open_llm(max_num_batched_tokens=budget, proposers=fakes(()))
    for name in "abcd":
        add(llm, name, 20, 8, proposer)
    step_until(llm, 4)
    for _ in range(4):
        assert step_names(llm) == set("abcd")


@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_starts_beside_greedy_drafters(depth: int, open_llm: Open) -> None:
    """Three rows could spend every step's budget on drafts until they end; a prompt must not wait for that."""
    llm = open_llm(max_num_batched_tokens=12, pipeline_depth=depth, proposers=fakes(()))
    for name in "abc":
        add(llm, name, 4, 16, "wrong", max_tokens=40)
    step_until(llm, 3)
    add(llm, "late", 16, 0, "wrong", max_tokens=2)
    seen = [step_names(llm) for _ in range(12)]
    assert any("late" in names for names in seen)
    assert all(name in llm.engine.scheduler.requests for name in "abc")


def test_drafts_use_the_whole_budget_when_nobody_waits(open_llm: Open) -> None:
    llm = open_llm(max_num_batched_tokens=20, proposers=fakes(()))
    add(llm, "a", 4, 16, "wrong", max_tokens=40)
    step_until(llm, 1)
    llm.engine.step()
    (request,) = llm.engine.scheduler.running
    assert len(request.stats.drafted_per_position) == 16


@pytest.mark.parametrize("depth", [1, 2])
def test_drafts_preempt_nobody(depth: int, open_llm: Open) -> None:
    """Both fit as long as the first one does not reserve all of its future."""
    llm = open_llm(max_model_len=40, num_blocks=14, pipeline_depth=depth, proposers=fakes(()))
    add(llm, "a", 4, 64, "wrong", max_tokens=36)
    add(llm, "b", 20, 0, "wrong", max_tokens=3)
    while llm.engine.has_work():
        llm.engine.step()
    assert llm.engine.stats().preemptions == 0
    assert llm.engine.stats().num_drafts > 0


def test_load_turns_drafting_off_and_its_end_on_again(open_llm: Open) -> None:
    """With every row asking for no number of its own; what comes out is the same as without drafts. Steps of more than
    nine tokens are said to take seconds."""
    llm = open_llm(max_num_seqs=24, num_blocks=24 * 16 + 1)
    width = Curve([(1, 1000.0), (9, 1000.0), (10, 5000.0), (11, 9000.0)])
    llm.engine.scheduler.policy.install(
        CostTable(decode=Curve([(1, 1000.0)]), verify=[(1, width), (24, Curve([(25, 1e5), (26, 2e5)]))])
    )
    prompts = [[3 + (7 * row + index) % 50 for index in range(5)] for row in range(24)]
    lengths = [8] * 23 + [40]
    asks = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length) for length in lengths]
    outputs = llm.generate(prompts, asks)
    assert all(output.speculation.rounds == 0 for output in outputs[:23]), "24 rows leave no token for drafts"
    assert outputs[23].speculation.drafted > 0, "alone at the end, after a catch-up, it drafts"
    off = [replace(ask, speculation=NO_SPECULATION) for ask in asks]
    assert [o.token_ids for o in llm.generate(prompts, off)] == [o.token_ids for o in outputs]


def test_a_flood_on_one_adapter_does_not_hold_up_another(open_llm: Open) -> None:
    """Five requests that come behind 200 take no more steps than alone on half the rows, once one is free."""
    answer = 8

    def ask(llm: LLM, name: str, adapter: str) -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=answer, speculation=NO_SPECULATION)
        lora = (LoraRef(adapter),)
        llm.engine.add_request(AddRequest(request_id=name, prompt_ids=[3, 4, 5], params=params, seed=0, lora=lora))

    def steps_until_served(llm: LLM) -> int:
        for name in few:
            ask(llm, name, "a1")
        for count in range(1000):
            if not few & llm.engine.scheduler.requests.keys():
                return count
            llm.engine.step()
        raise AssertionError("they were never served")

    few = {f"few {index}" for index in range(5)}
    half, whole = open_llm(max_num_seqs=2), open_llm(max_num_seqs=4)
    for llm in (half, whole):  # both adapters in host memory
        for adapter in ("a0", "a1"):
            llm.generate([[3, 4, 5]], SamplingParams(max_tokens=1), lora=[adapter])
    bound = steps_until_served(half)
    for index in range(200):
        ask(whole, str(index), "a0")
    for _ in range(2 * answer):
        whole.engine.step()
    assert steps_until_served(whole) <= bound + answer + 2
    assert len(whole.engine.scheduler.requests) > 150
