"""Lanes of waiting requests, the places where a lane can be, and which lane is next in fair order.

A lane is a flow's waiting requests on the same versions of its adapters: one is as near to running as the other.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from specserve.scheduling.flows import Flow
from specserve.scheduling.request import Request

HEAP_SLACK = 16


@dataclass(slots=True, eq=False)
class Lane:
    """`requests` in order of arrival; only the first is looked at."""

    flow: Flow
    requests: OrderedDict[Request, None] = field(default_factory=OrderedDict)

    @property
    def first(self) -> Request:
        return next(iter(self.requests))


class LaneHeap:
    """A set of lanes that tells which flow was served least; among equals the lane that was put in first.

    Counters only grow, so an outdated one is found when it comes to the top, and goes back down then.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Lane]] = []
        self._tickets: dict[Lane, int] = {}  # an entry of the heap with another ticket is void
        self._count = count()

    def __contains__(self, lane: object) -> bool:
        return lane in self._tickets

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._tickets)

    def push(self, lane: Lane) -> None:
        self._tickets[lane] = ticket = next(self._count)
        heappush(self._heap, (lane.flow.served, ticket, lane))
        if len(self._heap) > 2 * len(self._tickets) + HEAP_SLACK:
            self._heap = [(other.flow.served, ticket, other) for other, ticket in self._tickets.items()]
            heapify(self._heap)

    def discard(self, lane: Lane) -> None:
        self._tickets.pop(lane, None)

    def least(self) -> Lane | None:
        """The lane whose flow was served least."""
        while self._heap:
            served, ticket, lane = self._heap[0]
            if self._tickets.get(lane) != ticket:
                heappop(self._heap)
            elif served < lane.flow.served:
                heapreplace(self._heap, (lane.flow.served, ticket, lane))
            else:
                return lane
        return None


class Places:
    """Each lane is in one of six places, by the adapters of its first request.

    fresh     nobody has looked yet
    unread    they are being read into host memory
    cold      they are read, but do not all lie in device slots
    resident  they lie in slots, which it has not taken: others may push them out, and it is cold again
    copying   it has taken slots, which are being filled
    ready     it has slots that are filled, or needs none

    `holding`: those of the last two with slots. `starved`: the cold lane that was refused slots. `short`: the resident
    or ready lane that lacks KV blocks.
    """

    def __init__(self) -> None:
        self.fresh: dict[Lane, None] = {}
        self.unread: dict[Lane, None] = {}  # in the order in which their reads began
        self.cold = LaneHeap()
        self.resident = LaneHeap()
        self.copying: dict[Lane, None] = {}
        self.ready = LaneHeap()
        self.holding: dict[Lane, None] = {}
        self.starved: Lane | None = None
        self.short: Lane | None = None

    def leave(self, lane: Lane) -> None:
        """The lane is nowhere."""
        for place in (self.fresh, self.unread, self.copying, self.holding):
            place.pop(lane, None)
        for heap in (self.cold, self.resident, self.ready):
            heap.discard(lane)
        if lane is self.starved:
            self.starved = None
        if lane is self.short:
            self.short = None

    def cool(self, lane: Lane) -> None:
        """From wherever it is to `cold`."""
        self.leave(lane)
        self.cold.push(lane)

    def runnable(self) -> Lane | None:
        """The least served of those that could run now."""
        return _least(self.ready.least(), self.resident.least())

    def taker(self) -> Lane | None:
        """Who is the next to take slots ahead of a row: the starved, or the least served of those that need some."""
        return self.starved or _least(self.resident.least(), self.cold.least())

    def check_integrity(self, lanes: Collection[Lane]) -> None:
        """Assert that each of `lanes` is in one place, and that only first requests have slots."""
        places = [*self.fresh, *self.unread, *self.cold, *self.resident, *self.copying, *self.ready]
        assert len(places) == len(set(places)) and set(places) == set(lanes), "a lane is lost or doubled"
        for lane in lanes:
            holders = [request for request in lane.requests if request.slots is not None]
            assert holders == ([lane.first] if lane in self.holding else []), "slots in the wrong hands"
        assert self.holding.keys() <= {*self.copying, *self.ready}
        assert self.starved is None or self.starved in self.cold
        assert self.short is None or self.short in self.ready or self.short in self.resident


def _least(one: Lane | None, other: Lane | None) -> Lane | None:
    """Of these the one served less; the first if they are even."""
    if one is None or other is None:
        return one or other
    return other if other.flow.served < one.flow.served else one
