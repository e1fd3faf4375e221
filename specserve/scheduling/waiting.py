"""WaitingLine: who waits for a row, who is next, and the adapters' way to the device meanwhile.

Only the first request of each lane is looked at (lanes.py), so a step's work does not grow with the number of those who
wait. Of the lanes that could run, the one whose flow was served least is next (flows.py).

**Slots before rows.** Lanes take slots in fair order, all or nothing, for a few requests more than rows are free: the
copy is done by the time that a row is. A request whose adapters lie in slots already may take them with its row.

**No deadlock.** Everybody takes slots, then a row, then blocks, and keeps them. Whoever runs needs no more slots and
gets blocks by preemption, so it ends; whoever waits with slots needs only a row and blocks, which those that run give
back; and whoever waits for slots waits for these two. A preempted request keeps its slots.

**Nobody is passed over for ever.** The first lane that is refused slots is starved: no other may load anything before
it. Requests whose adapters lie in slots may still run, as many as there are rows; then they too queue behind it, while
slots drain. A request that lacks KV blocks holds all others back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain, islice

from specserve.core.errors import AdapterError
from specserve.core.flows import flow_key
from specserve.core.plan import AdapterLoad
from specserve.scheduling.adapter_slots import AdapterSlots, Uses
from specserve.scheduling.flows import Flow, FlowTable
from specserve.scheduling.lanes import Lane, Places
from specserve.scheduling.request import Request
from specserve_adapters.entry import Entry

LOOKS = 8  # reads end about in the order in which they began: so many of the oldest are asked each step, and others


class WaitingLine:
    """`fail(request, error)` is told of requests whose adapters cannot be read; it must `remove` them.

    Preempted requests come before everybody.
    """

    def __init__(
        self, adapters: AdapterSlots, max_num_seqs: int, fail: Callable[[Request, AdapterError], None]
    ) -> None:
        self.flows = FlowTable()
        self._adapters = adapters
        self._fail = fail
        self._ahead = max(1, max_num_seqs // 4)  # requests with slots beyond those that have a free row
        self._max_passes = max_num_seqs
        self._preempted: deque[Request] = deque()
        self._lanes: dict[frozenset[Entry], Lane] = {}  # no empty ones
        self._size = 0
        self._places = Places()
        self._passes = 0  # requests that took their slots since one has starved
        self._patrol = 0  # where among the unread the next look begins

    def __len__(self) -> int:
        return self._size + len(self._preempted)

    def __iter__(self) -> Iterator[Request]:
        return chain(self._preempted, *(lane.requests for lane in self._lanes.values()))

    # --- coming and going -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request joins its flow; what it needs begins to be read."""
        uses = request.adapter_uses
        flow = request.flow = self.flows.join(flow_key(request.lora), self._adapters.weight_of(uses))
        runnable = self._places.runnable()
        self.flows.wait(flow, runnable.flow if runnable is not None else None)
        key = _lane_key(uses)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(flow)
            self._places.fresh[lane] = None
        lane.requests[request] = None
        self._size += 1
        with suppress(AdapterError):  # which it will be told when it is first
            self._adapters.prepare(uses)

    def put_back(self, request: Request) -> None:
        """It lost its row, not its slots, and comes first."""
        self._preempted.appendleft(request)

    def remove(self, request: Request) -> None:
        """It waits no longer; its slots are its own affair."""
        if request.epoch:
            self._preempted.remove(request)
            return
        key = _lane_key(request.adapter_uses)
        lane = self._lanes[key]
        was_first = request is lane.first
        del lane.requests[request]
        lane.flow.num_waiting -= 1
        self._size -= 1
        if not was_first:
            return
        self._places.leave(lane)
        if lane.requests:
            self._places.fresh[lane] = None
        else:
            del self._lanes[key]

    def charge(self, request: Request, tokens: int) -> None:
        """`tokens` more were computed of its prompt, or generated."""
        self.flows.charge(_flow(request), tokens)

    def forget(self, request: Request) -> None:
        """It is gone: neither waiting nor on a row."""
        self.flows.leave(_flow(request))

    # --- adapters ---------------------------------------------------------------------------------------------------

    def advance(self, num_free_rows: int, loads: list[AdapterLoad]) -> None:
        """Once a step: see what was read and copied, and take slots; what to copy into them is added to `loads`."""
        places = self._places
        for lane in [*places.fresh, *self._some_unread()]:
            self._look(lane)
        for lane in [lane for lane in places.copying if self._adapters.slots_live(lane.first.adapter_uses)]:
            del places.copying[lane]
            places.ready.push(lane)
        self._take_ahead(num_free_rows + self._ahead, loads)
        runnable = places.runnable()
        if runnable is not None:
            self.flows.raise_floor(runnable.flow.served)

    def _some_unread(self) -> list[Lane]:
        """The oldest, and by turns all others: an adapter that a neighbour brought in may be there before its turn."""
        unread = self._places.unread
        start = self._patrol if LOOKS <= self._patrol < len(unread) else LOOKS
        self._patrol = start + LOOKS
        return [*islice(unread, LOOKS), *islice(unread, start, start + LOOKS)]

    def _look(self, lane: Lane) -> None:
        """Place a fresh or unread lane by its first request whose adapters do not fail."""
        places = self._places
        while lane.requests:
            request = lane.first
            try:
                prepared = self._adapters.prepare(request.adapter_uses)
            except AdapterError as error:
                self._fail(request, error)
                continue
            places.fresh.pop(lane, None)
            if not prepared:
                places.unread[lane] = None
                return
            places.unread.pop(lane, None)
            if not request.adapter_uses:
                places.ready.push(lane)
            else:
                live = self._adapters.slots_live(request.adapter_uses)
                (places.resident if live else places.cold).push(lane)
            return

    def _take_ahead(self, limit: int, loads: list[AdapterLoad]) -> None:
        """Let lanes take slots until `limit` requests wait with theirs, or one is refused."""
        places = self._places
        while len(places.holding) < limit:
            lane = places.taker()
            if lane is None:
                return
            request = lane.first
            granted = self._adapters.take_slots(request.adapter_uses)
            if granted is None:
                if lane is not places.starved:
                    places.cool(lane)
                    places.starved, self._passes = lane, 0
                return
            request.slots, new = granted
            loads += new
            places.leave(lane)
            places.holding[lane] = None
            if self._adapters.slots_live(request.adapter_uses):
                places.ready.push(lane)
            else:
                places.copying[lane] = None

    # --- who is next ------------------------------------------------------------------------------------------------

    def next(self) -> Request | None:
        """Who takes the next free row: call `take`, or `hold_back` if it lacks blocks. None: nobody can now."""
        for request in self._preempted:
            if not request.num_in_flight:
                return request
        while (lane := self._places.short or self._places.runnable()) is not None:
            if lane in self._places.ready or self._may_pass(lane.first):
                return lane.first
            self._places.cool(lane)
        return None

    def _may_pass(self, request: Request) -> bool:
        """Whether a resident request may take its slots with its row."""
        overdue = self._places.starved is not None and self._passes >= self._max_passes
        return not overdue and self._adapters.slots_live(request.adapter_uses)

    def hold_back(self, request: Request) -> None:
        """`next` lacks blocks: it is the next until it gets them."""
        if not request.epoch:
            self._places.short = self._lanes[_lane_key(request.adapter_uses)]

    def take(self, request: Request) -> None:
        """`next` leaves for a row, with its slots."""
        if request.slots is None:
            granted = self._adapters.take_slots(request.adapter_uses)
            assert granted is not None and not granted[1], "what lies in slots can be taken"
            request.slots = granted[0]
            self._passes += bool(request.adapter_uses)
        self.remove(request)
        if not request.epoch and (lane := self._lanes.get(_lane_key(request.adapter_uses))) is not None:
            self._look(lane)

    def check_integrity(self) -> None:
        """Assert that no waiting request is lost, and that each has the slots that it should."""
        assert all(lane.requests for lane in self._lanes.values()), "a lane without requests stays"
        assert self._size == sum(len(lane.requests) for lane in self._lanes.values()), "miscounted"
        assert self._size == sum({lane.flow: lane.flow.num_waiting for lane in self._lanes.values()}.values())
        assert all(request.slots is not None for request in self._preempted)
        self._places.check_integrity(self._lanes.values())


def _lane_key(uses: Uses) -> frozenset[Entry]:
    return frozenset(use.entry for use in uses)


def _flow(request: Request) -> Flow:
    assert request.flow is not None, "it was never added"
    return request.flow
