"""Flows: who was served how much, so that each adapter's requests get their share of the tokens.

A flow is the requests that name the same adapters. Each has a counter of the tokens that it was served (prompt tokens
computed, tokens generated) divided by its weight, and of the flows that could run the one with the smallest is next.
That is deficit round robin (Shreedhar, Varghese 1996) with a quantum of one token, and with service charged as it
happens, since nobody knows beforehand how long an answer will be: the virtual token counter of Sheng et al. 2024.

No credit: a flow that begins to wait is lifted to `floor`, the smallest counter of those that could have run. No
washing: a flow above the floor keeps its counter though it has no request for a moment; the MAX_DEBTORS that left last
are remembered. Once nobody who could run waits, everybody had what they wanted, and what was before no longer counts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from specserve.core.flows import FlowKey

MAX_DEBTORS = 1024


@dataclass(slots=True, eq=False)
class Flow:
    """`served`: tokens over weight, never falling. `num_requests`: those that wait or run; `num_waiting`: those that
    wait for their first row."""

    key: FlowKey
    weight: float = 1.0
    served: float = 0.0
    num_requests: int = 0
    num_waiting: int = 0


class FlowTable:
    """All flows with requests, and those without that are in debt."""

    def __init__(self) -> None:
        self.floor = 0.0
        self._most = 0.0  # the largest counter there ever was
        self._flows: dict[FlowKey, Flow] = {}
        self._debtors: OrderedDict[FlowKey, Flow] = OrderedDict()  # the one that left first is forgotten first

    def join(self, key: FlowKey, weight: float) -> Flow:
        """A request comes: its flow, which has this weight from now on."""
        flow = self._flows.get(key) or self._debtors.pop(key, None) or Flow(key)
        self._flows[key] = flow
        flow.weight = weight
        flow.num_requests += 1
        return flow

    def leave(self, flow: Flow) -> None:
        """One of its requests ended."""
        flow.num_requests -= 1
        if flow.num_requests:
            return
        del self._flows[flow.key]
        if flow.served > self.floor:
            self._debtors[flow.key] = flow
            if len(self._debtors) > MAX_DEBTORS:
                self._debtors.popitem(last=False)

    def wait(self, flow: Flow, first: Flow | None) -> None:
        """One more of its requests waits, beside `first`, the least served of those that could run (None: there is
        none)."""
        if not flow.num_waiting:
            self.raise_floor(self._most if first is None else first.served)
            flow.served = max(flow.served, self.floor)
        flow.num_waiting += 1

    def raise_floor(self, served: float) -> None:
        self.floor = max(self.floor, served)

    def charge(self, flow: Flow, tokens: int) -> None:
        """`tokens` of its prompts were computed, or generated for it."""
        flow.served += tokens / flow.weight
        self._most = max(self._most, flow.served)

    def check_integrity(self, num_requests: int) -> None:
        """Assert that the flows have the requests that there are, and that debtors have none."""
        assert sum(flow.num_requests for flow in self._flows.values()) == num_requests, "a flow lost count"
        assert all(flow.num_requests > 0 for flow in self._flows.values()), "a flow without requests stays"
        assert not self._flows.keys() & self._debtors.keys() and len(self._debtors) <= MAX_DEBTORS
        assert not any(flow.num_requests or flow.num_waiting for flow in self._debtors.values())
