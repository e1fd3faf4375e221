"""A full house refuses the flood, not who comes beside it."""

from __future__ import annotations

import pytest

from specserve.core.errors import OverloadedError
from specserve.core.flows import FlowKey, flow_key
from specserve.core.messages import LoraRef
from specserve.engine.client.admission import OVERSHOOT, Admission


def fill(admission: Admission, flow: FlowKey) -> int:
    """Let in sequences one by one until one is refused: how many came in."""
    for count in range(10_000):
        try:
            admission.check(flow, 1)
        except OverloadedError:
            return count
        admission.enter(flow)
    raise AssertionError("there is no limit")


def test_one_flow_gets_the_whole_limit() -> None:
    admission = Admission(8)
    admission.check((), 8)
    with pytest.raises(OverloadedError, match="at most 8 may"):
        admission.check((), 9)
    assert fill(admission, ()) == 8


def test_who_comes_beside_a_flood_gets_its_share() -> None:
    admission = Admission(12)
    assert fill(admission, ("flood",)) == 12
    assert fill(admission, ("b",)) == 6
    assert fill(admission, ("c",)) == 4
    with pytest.raises(OverloadedError, match="12 of them on the same adapters, whose share is 4"):
        admission.check(("flood",), 1)
    for _ in range(9):
        admission.leave(("flood",))
    assert fill(admission, ("flood",)) == 1  # it is below its share of 4 only until then


def test_many_flows_overshoot_by_no_more_than_twice() -> None:
    admission = Admission(10)
    assert sum(fill(admission, (str(index),)) for index in range(50)) == OVERSHOOT * 10


def test_below_the_limit_nobody_is_refused_and_all_is_counted_back() -> None:
    admission = Admission(4)
    for flow in ((), ("a",), ("b",)):
        admission.enter(flow)
    admission.check(("a",), 1)
    for flow in ((), ("a",), ("b",)):
        admission.leave(flow)
    assert fill(admission, ("b",)) == 4


def test_a_flow_is_its_adapters_in_any_order_at_any_scale() -> None:
    assert flow_key([LoraRef("b"), LoraRef("a", 0.5), LoraRef("b", 2.0)]) == flow_key([LoraRef("a"), LoraRef("b")])
    assert flow_key([]) == ()
