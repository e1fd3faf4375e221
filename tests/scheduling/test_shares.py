"""Who is next: tokens are shared among flows, in order of arrival within each."""

from __future__ import annotations

import pytest

from schedkit.adapters import FakeAdapters
from schedkit.desk import Desk
from specserve.scheduling.flows import MAX_DEBTORS, FlowTable

ANSWER = 8


@pytest.mark.parametrize("lora", [(), ("a",), ("a", "b")])
def test_one_flow_is_served_in_order_of_arrival(lora: tuple[str, ...]) -> None:
    desk = Desk()
    names = [f"x{index}" for index in range(30)]
    for name in names:
        desk.add(name, *lora, answer=1 + int(name[1:]) % 7)
    desk.steps_until(*names)
    assert desk.started == names


def test_a_flood_starves_nobody() -> None:
    """Five requests behind 200 of another adapter take as long as alone on half the rows, once a row is free."""
    alone = Desk(rows=4)
    few = [f"b{index}" for index in range(5)]
    for name in few:
        alone.add(name, "b", answer=ANSWER)
    bound = alone.steps_until(*few)
    desk = Desk(rows=8)
    for index in range(200):
        desk.add(f"a{index}", "a", answer=ANSWER)
    desk.step(20)
    for name in few:
        desk.add(name, "b", answer=ANSWER)
    assert desk.steps_until(*few) <= bound + ANSWER + 2
    assert len(desk.scheduler.requests) > 100


def test_flows_that_come_together_start_together() -> None:
    """Before anybody has said a token, prompts are charged: a flood does not take all rows at once."""
    desk = Desk(rows=8)
    for index in range(20):
        desk.add(f"a{index}", "a")
    for index in range(4):
        desk.add(f"b{index}", "b")
    desk.step(3)
    assert {f"b{index}" for index in range(4)} <= set(desk.started[:8])


@pytest.mark.parametrize("answers", [(8, 8), (24, 4)], ids=["even", "long-and-short"])
def test_weights_share_tokens(answers: tuple[int, int]) -> None:
    adapters = FakeAdapters()
    adapters.weights = {"light": 1.0, "heavy": 3.0}
    desk = Desk(adapters, rows=8)
    for index in range(600):
        desk.add(f"light{index}", "light", answer=answers[0])
        desk.add(f"heavy{index}", "heavy", prompt=2, answer=answers[1])
    desk.step(200)
    served = {name: sum(flow.served for flow in desk.scheduler.waiting.flows._flows.values() if flow.key == (name,))
              for name in adapters.weights}  # fmt: skip
    assert served["heavy"] == pytest.approx(served["light"], rel=0.1)
    if answers == (8, 8):  # a light request costs 12 tokens, a heavy one 10
        assert desk.tokens["heavy"] / desk.tokens["light"] == pytest.approx(3 * (8 / 10) / (8 / 12), rel=0.1)


def test_who_was_idle_has_no_credit() -> None:
    """What others were served meanwhile is not owed: from its arrival on both get the same."""
    desk = Desk(rows=4)
    for index in range(500):
        desk.add(f"a{index}", "a")
    desk.step(300)
    before = desk.tokens["a"]
    for index in range(500):
        desk.add(f"b{index}", "b")
    desk.step(200)
    assert desk.tokens["b"] == pytest.approx(desk.tokens["a"] - before, rel=0.15)


def test_debt_is_not_washed_by_a_moment_without_requests() -> None:
    """A flow that was served much while others waited stays behind them though it had nothing waiting."""
    desk = Desk(rows=1)
    desk.add("a0", "a", answer=60)
    desk.step()
    for index in range(3):
        desk.add(f"b{index}", "b", answer=10)
    desk.steps_until("a0")
    assert not any(request.lora[0].name == "a" for request in desk.scheduler.waiting)
    desk.add("a1", "a")
    desk.steps_until("a1")
    assert desk.ended == ["a0", "b0", "b1", "b2", "a1"]


def test_once_nobody_waits_nothing_is_owed() -> None:
    desk = Desk(rows=2)
    desk.add("a0", "a", answer=60)
    desk.add("b0", "b", answer=2)
    desk.step(80)
    assert desk.ended == ["b0", "a0"]
    for name in ("a1", "b1", "a2", "b2"):
        desk.add(name, name[0])
    desk.steps_until("a2", "b2")
    assert desk.started[2:] == ["a1", "b1", "a2", "b2"]


def test_who_lost_its_row_is_the_next() -> None:
    """Though its flow was served more than those that wait."""
    desk = Desk(rows=2, blocks=13)
    desk.add("a0", "a", answer=28)
    desk.add("a1", "a", answer=28)
    desk.step(4)
    for index in range(3):
        desk.add(f"b{index}", "b", answer=28)
    desk.steps_until("a0", "a1")
    assert desk.scheduler.stats.preemptions > 0
    assert desk.ended[0] == "a0" and desk.started[:2] == ["a0", "a1"]
    desk.steps_until("b0", "b1", "b2")


def test_what_is_remembered_is_bounded() -> None:
    table = FlowTable()
    hog = table.join(("hog",), 1.0)
    table.wait(hog, None)
    for index in range(MAX_DEBTORS + 50):
        flow = table.join((str(index),), 1.0)
        table.wait(flow, hog)
        table.charge(flow, 5)
        flow.num_waiting -= 1
        table.leave(flow)
    table.check_integrity(1)
    assert table.join((str(MAX_DEBTORS + 49),), 1.0).served == 5
    assert table.join(("0",), 1.0).served == 0
