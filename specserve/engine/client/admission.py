"""How many sequences are let in, and whose are refused when there are too many."""

from __future__ import annotations

from collections import Counter

from specserve.core.errors import OverloadedError
from specserve.core.flows import FlowKey

OVERSHOOT = 2  # times the limit, at most, when many flows come to a full house


class Admission:
    """At most `limit` sequences run or wait, as long as one flow alone wants more.

    When they are so many, a flow (the requests that name the same adapters) is still let in up to its share, the limit
    divided by the number of flows: it is the flood that is refused, not who comes beside it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: Counter[FlowKey] = Counter()  # > 0
        self._total = 0

    def check(self, flow: FlowKey, num_new: int) -> None:
        """Raise OverloadedError unless so many more of the flow may come."""
        total = self._total + num_new
        if total <= self.limit:
            return
        own = self._counts[flow]  # a Counter: 0, and still absent, if there are none
        num_flows = len(self._counts) + (not own)
        share = max(1, self.limit // num_flows)
        if own + num_new <= share and total <= OVERSHOOT * self.limit:
            return
        beside = f"; {own} of them on the same adapters, whose share is {share}" if num_flows > 1 else ""
        raise OverloadedError(
            f"{self._total} sequences are running or waiting, at most {self.limit} may{beside}. Try later."
        )

    def enter(self, flow: FlowKey) -> None:
        self._counts[flow] += 1
        self._total += 1

    def leave(self, flow: FlowKey) -> None:
        self._counts[flow] -= 1
        self._total -= 1
        if not self._counts[flow]:
            del self._counts[flow]
