"""Copies into slots that take many steps: nobody else waits, nobody reads a slot too early, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lawbook.zoo import Zoo
from specserve.core.messages import AddRequest, LoadAdapter, LoraRef, RequestOutput, UnloadAdapter
from specserve.core.plan import AdapterLoad, StepPlan
from specserve.core.sampling_params import SamplingParams
from specserve.engine.core import core as core_module
from specserve.llm import LLM
from specserve.runtime.ticket import Ticket

Open = Callable[..., LLM]
PROMPT = [7, 9, 11, 20, 21, 22, 7, 9, 11]


class SlowCopies:
    """The engine's runner, but that a load begins to be seen `delay` asks after it was submitted: until then its slot
    holds what it held, as on a device. No plan may name it meanwhile."""

    def __init__(self, llm: LLM, delay: int) -> None:
        self.runner = llm.engine.built.runner
        self.delay = delay
        self.asks = 0
        self.under_way: list[tuple[int, AdapterLoad]] = []
        self.began = 0
        llm.engine.executor = self

    def submit(self, plan: StepPlan) -> Ticket:
        loading = {load.slot for _, load in self.under_way} | {load.slot for load in plan.adapter_loads}
        named = {slot for row in plan.new_rows for slot, _ in row.adapters}
        assert loading.isdisjoint(named), "a row names a slot that does not hold its adapter yet"
        self.began += len(plan.adapter_loads)
        self.under_way += [(self.asks + self.delay, load) for load in plan.adapter_loads]
        return self.runner.submit(plan)

    def loaded(self) -> list[AdapterLoad]:
        self.asks += 1
        self.runner.loaded()
        ended = [load for at, load in self.under_way if at <= self.asks]
        del self.under_way[: len(ended)]
        return ended


def add(llm: LLM, name: str, *adapters: str, max_tokens: int = 8) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    lora = tuple(LoraRef(adapter) for adapter in adapters)
    llm.engine.add_request(AddRequest(request_id=name, prompt_ids=PROMPT, params=params, seed=0, lora=lora))


def run(llm: LLM, steps: int = 2000) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(steps):
        if not llm.engine.has_work():
            break
        llm.engine.adapters.wait(10)
        llm.engine.poll_replies()
        for output in llm.engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert not llm.engine.has_work()
    return tokens


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "IDLE_SECONDS", 0.0)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("delay", [1, 7])
def test_the_same_tokens(slots: int, delay: int, open_llm: Open) -> None:
    """Sums, several rounds through few slots, the base beside them; with a draft and its companions."""
    truth, llm = open_llm(max_loras=4), open_llm(max_loras=slots)
    slow = SlowCopies(llm, delay)
    asked = {f"{n}{round}": [n] for round in range(3) for n in ("a0", "a1", "a2")} | {"base": []}
    if slots > 1:
        asked["sum"] = ["a0", "a1"]
    for name, adapters in asked.items():
        add(llm, name, *adapters)
        add(truth, name, *adapters)
    assert run(llm) == run(truth)
    assert slow.began >= 3
    assert llm.engine.adapters.num_loading == 0


def test_nobody_waits_for_a_copy_but_those_who_need_it(open_llm: Open) -> None:
    llm = open_llm()
    slow = SlowCopies(llm, 0)
    add(llm, "first", "a0")
    run(llm)
    slow.delay = 100
    add(llm, "warm", "a0")
    add(llm, "cold", "a1")
    add(llm, "base")
    outputs: list[RequestOutput] = []
    for _ in range(60):
        llm.engine.adapters.wait(10)
        llm.engine.poll_replies()
        outputs += llm.engine.step()
    assert {output.request_id for output in outputs} == {"warm", "base"}
    assert llm.engine.adapters.num_loading == 1
    assert set(run(llm)) == {"cold"}


@pytest.mark.parametrize("then", ["abort", "unload", "reload"])
def test_while_it_is_copied(then: str, zoo: Zoo, open_llm: Open) -> None:
    """The request or its adapter goes, or is replaced; the slot is taken by others before the copy has ended."""
    truth, llm = open_llm(), open_llm(max_loras=1)
    slow = SlowCopies(llm, 6)
    add(llm, "cold", "a1")
    while not slow.under_way:
        llm.engine.adapters.wait(10)
        llm.engine.poll_replies()
        llm.engine.step()
    if then == "abort":
        llm.engine.abort_requests(["cold"])
    elif then == "unload":
        llm.engine.handle(UnloadAdapter(call_id=1, name="a1"))
    else:
        path = str(zoo.adapters["near"]["a2"])
        llm.engine.handle(LoadAdapter(call_id=1, name="a1", path=path, replace=True))
    add(llm, "other", "a0")
    got = run(llm)
    for name, adapter in (("cold", "a1"), ("other", "a0")):
        add(truth, name, adapter)
    want = run(truth)
    assert got["other"] == want["other"]
    assert got.get("cold") == (None if then == "abort" else want["cold"])
    llm.engine.check_integrity()
