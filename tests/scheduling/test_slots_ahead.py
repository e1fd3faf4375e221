"""Adapters come to the device before their request's turn, and nobody waits for a slot for ever."""

from __future__ import annotations

from collections import Counter

import pytest

from schedkit.adapters import FakeAdapters
from schedkit.desk import Desk


def test_reads_and_copies_hide_behind_the_wait_for_a_row() -> None:
    """A cold request takes the row in the very step in which a request of the base model would."""
    ended: list[list[str]] = []
    for lora in ((), ("cold",)):
        desk = Desk(FakeAdapters(read_steps=5, load_steps=3), rows=1)
        desk.add("base0", answer=20)
        desk.step()
        desk.add("next0", *lora, answer=4)
        desk.step(19)
        assert desk.ended == ["base0"]
        desk.step(4)
        ended.append(desk.ended)
    assert ended == [["base0", "next0"]] * 2


def test_a_read_begins_when_the_request_comes() -> None:
    desk = Desk(FakeAdapters(read_steps=5))
    (use,) = desk.add("x0", "x").adapter_uses
    assert use.entry.reading  # type: ignore[attr-defined]


def test_a_neighbours_adapter_is_no_ones_to_wait_for() -> None:
    """Neither a read nor a copy holds back those who need neither."""
    desk = Desk(FakeAdapters(read_steps=50, load_steps=50), rows=4)
    desk.add("cold0", "cold")
    desk.add("base0")
    desk.step(9)
    assert desk.ended == ["base0"]
    desk.step(50)
    desk.add("base1")
    desk.step(9)
    assert desk.ended == ["base0", "base1"]
    desk.steps_until("cold0")


@pytest.mark.parametrize("wanted", [("cold",), ("cold", "colder")], ids=["one", "sum"])
def test_a_cold_adapter_among_hot_ones_gets_its_slots(wanted: tuple[str, ...]) -> None:
    """With hot adapters in all slots and requests for them without end."""
    rows, answer = 4, 8
    desk = Desk(FakeAdapters(2, read_steps=2, load_steps=2), rows=rows)
    for index in range(200):
        desk.add(f"a{index}", "hot", answer=answer)
        desk.add(f"b{index}", "warm", answer=answer)
    desk.step(20)
    before = len(desk.started)
    desk.add("cold0", *wanted, answer=answer)
    desk.steps_until("cold0")
    passed = desk.started[before:].index("cold0")
    assert passed <= 2 * rows + 2  # those that had their slots already, and so many passes as there are rows
    desk.steps_until("a199", "b199")


def test_hot_requests_use_the_rows_while_a_cold_one_waits() -> None:
    desk = Desk(FakeAdapters(1), rows=4)
    desk.add("hot0", "hot", answer=30)
    desk.step()
    desk.add("cold0", "cold")
    desk.step()
    for index in range(1, 8):
        desk.add(f"hot{index}", "hot", answer=4)
    desk.step()
    assert desk.started == ["hot0", "hot1", "hot2", "hot3"]
    desk.steps_until("cold0")
    assert desk.started.index("cold0") == 5  # hot0, and four that passed


def test_an_aborted_request_gives_back_the_slots_that_it_waited_with() -> None:
    desk = Desk(FakeAdapters(2), rows=1)
    desk.add("base0", answer=30)
    desk.step()
    desk.add("x0", "x")
    desk.step(2)
    assert sum(desk.adapters.uses.values()) == 1, "it holds a slot while it waits"
    desk.scheduler.abort("x0")
    desk.adapters.check_unused()


def test_slots_are_taken_for_few_requests_beyond_the_rows() -> None:
    """The others stay free for whoever comes with a better claim."""
    desk = Desk(FakeAdapters(64), rows=8)
    for index in range(8):
        desk.add(f"base{index}", answer=30)
    desk.step()
    for index in range(40):
        desk.add(f"x{index}", str(index))
    desk.step(5)
    assert sum(desk.adapters.uses.values()) == 2


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("num_flows", [1, 1000, 4096])
def test_a_step_looks_at_few_of_those_who_wait(num_flows: int, reading: bool) -> None:
    desk = Desk(FakeAdapters(4, read_steps=10**6 if reading else 0, load_steps=10**6), rows=8)
    for index in range(4096):
        desk.add(f"x{index}", str(index % num_flows))
    schedule = desk.scheduler.schedule
    desk.device.execute(schedule())  # now each flow has been looked at once
    desk.adapters.asked = Counter()
    schedule()
    assert desk.adapters.asked.total() <= 20
