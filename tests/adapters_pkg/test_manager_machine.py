"""AdapterManager under random requests, loads, reloads, pins, broken and changing folders.

A simulated device holds what the AdapterLoads put there, each when it ends. Whatever happens: a request whose slots are
said to be live finds its versions in them, a request never changes its versions once it has begun, somebody can always
go on, and nothing is left at the end. Reads end on other threads; their results are taken in by `drain` alone, so that
every run of an example is the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from specserve.core.errors import AdapterBusyError, AdapterError, NotFoundError, SpecserveError
from specserve.core.messages import AdapterInfo, LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.adapter_files import hash_adapter
from specserve_adapters.entry import AdapterUse
from specserve_adapters.manager import AdapterManager, LoadTicket
from specserve_adapters.spec import LinearSpec

NAMES = st.sampled_from("abcde")
CONTENTS = 4
UNIT = 2 * 32 * 4  # bytes a rank
CHOICE = st.integers(0, 99)


@dataclass(eq=False)
class Request:
    uses: tuple[AdapterUse, ...]
    slots: tuple[int, ...] | None = None
    key: list[tuple[str, float]] | None = None  # once it has begun


class ManagerMachine(RuleBasedStateMachine):
    def __init__(self, specs: list[LinearSpec], write_adapter: Any) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.manager = AdapterManager(
            specs,
            None,
            num_slots=3,
            max_rank=4,
            max_host_bytes=8 * UNIT,
            dtype=torch.float32,
            draft_dtype=torch.float32,
        )
        self.write = write_adapter
        self.requests: list[Request] = []
        self.tickets: list[LoadTicket] = []
        self.device: dict[int, str] = {}
        self.loads: deque[AdapterLoad] = deque()  # under way
        self.told: dict[str, AdapterInfo] = {}  # what `changed` has told so far
        self.versions: dict[str, int] = {}  # of all contents ever written → content
        for content, name in enumerate("abcde"):
            self.rewrite(name, content % CONTENTS)
            self.manager.register(name, self.root / name)

    def rewrite(self, name: str, content: int) -> None:
        self.write(self.root / name, content, rank=content + 1)
        self.versions[hash_adapter(self.root / name, None)] = content

    # --- what the world does ---

    @rule(name=NAMES, content=st.integers(0, CONTENTS - 1))
    def change_folder(self, name: str, content: int) -> None:
        self.drain()  # no half-written files: a torn folder is a broken one, which break_folder covers
        self.rewrite(name, content)

    @rule(name=NAMES)
    def break_folder(self, name: str) -> None:
        self.drain()
        (self.root / name / "adapter_model.safetensors").write_bytes(b"broken")

    @rule(name=NAMES, folder=NAMES, replace=st.booleans(), pinned=st.booleans())
    def load(self, name: str, folder: str, replace: bool, pinned: bool) -> None:
        try:
            self.tickets.append(self.manager.load(name, self.root / folder, replace=replace, pinned=pinned))
        except AdapterBusyError:
            assert pinned
        except AdapterError:
            assert not replace

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        try:
            self.manager.unload(name)
        except NotFoundError:
            assert name not in self.names()
        except AdapterBusyError:
            assert self.manager.info(name).pinned

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        try:
            self.manager.pin(name, pinned)
        except NotFoundError:
            assert name not in self.names()
        except AdapterBusyError:
            assert pinned

    @rule(names=st.lists(NAMES, min_size=1, max_size=3))
    def arrive(self, names: list[str]) -> None:
        try:
            uses = self.manager.acquire(tuple(LoraRef(name, 0.5) for name in names))
        except NotFoundError:
            assert not set(names) <= self.names()
        except AdapterBusyError:
            assert any(info.pinned for info in self.manager.list())
        else:
            self.requests.append(Request(uses))

    # --- what a scheduler does ---

    @precondition(lambda self: self.requests)
    @rule(choice=CHOICE)
    def admit(self, choice: int) -> None:
        request = self.requests[choice % len(self.requests)]
        if request.slots is None:
            self.try_place(request)

    def try_place(self, request: Request) -> None:
        try:
            if not self.manager.prepare(request.uses):
                return
        except AdapterError:
            assert request.key is None, "it had begun"
            self.leave(request)
            return
        key = self.manager.cache_key(request.uses)
        assert request.key in (None, key), "a request never changes its versions"
        assert all(version in self.versions for version, _ in key)
        taken = self.manager.take_slots(request.uses)
        if taken is None:
            return
        pairs, loads = taken
        for load in loads:
            target, draft = self.manager.host(load.version)
            assert draft is None
            assert target.rank == self.versions[load.version] + 1
            self.loads.append(load)
        assert [weight for _, weight in pairs] == [weight for _, weight in key]
        request.key, request.slots = key, tuple(slot for slot, _ in pairs)

    @precondition(lambda self: self.loads)
    @rule()
    def end_a_load(self) -> None:
        load = self.loads.popleft()
        self.device[load.slot] = load.version
        self.manager.loaded(load)

    @precondition(lambda self: any(request.slots is not None for request in self.requests))
    @rule(choice=CHOICE)
    def preempt(self, choice: int) -> None:
        placed = [request for request in self.requests if request.slots is not None]
        self.unplace(placed[choice % len(placed)])

    @precondition(lambda self: self.requests)
    @rule(choice=CHOICE)
    def finish_or_abort(self, choice: int) -> None:
        self.leave(self.requests[choice % len(self.requests)])

    @rule()
    def drain(self) -> None:
        self.take_tickets()
        while self.manager.wait(30):
            self.take_tickets()

    # --- helpers and laws ---

    def names(self) -> set[str]:
        return {info.name for info in self.manager.list()}

    def take_tickets(self) -> None:
        for ticket in self.manager.poll():
            assert ticket.done
            assert ticket.error is None or isinstance(ticket.error, SpecserveError)
            self.tickets.remove(ticket)

    def unplace(self, request: Request) -> None:
        self.manager.release_slots(request.uses)
        request.slots = None

    def leave(self, request: Request) -> None:
        if request.slots is not None:
            self.unplace(request)
        self.manager.release(request.uses)
        self.requests.remove(request)

    @invariant()
    def holds(self) -> None:
        self.manager.check_integrity()
        for request in self.requests:
            if request.slots is None:
                continue
            assert request.key is not None
            under_way = {load.slot for load in self.loads}
            assert self.manager.slots_live(request.uses) == under_way.isdisjoint(request.slots)
            if self.manager.slots_live(request.uses):
                assert [self.device[slot] for slot in request.slots] == [version for version, _ in request.key]
        info = self.manager.list()
        assert {i.slot: i.version for i in info if i.slot is not None}.items() <= self.device.items()
        changed, gone = self.manager.changed()
        for name in gone:
            del self.told[name]
        self.told.update((i.name, i) for i in changed)
        assert self.told == {i.name: i for i in info}

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.manager.close()
            shutil.rmtree(self.root)

    def end(self) -> None:
        for _ in range(3 * len(self.requests) + 3):  # in every third round, at the least, somebody ends
            for request in list(self.requests):
                if request.slots is None:
                    self.try_place(request)
            self.drain()
            while self.loads:
                self.end_a_load()
            self.holds()
            for request in [request for request in self.requests if request.slots is not None]:
                self.leave(request)
        assert self.requests == [], "nobody can go on"
        self.drain()
        assert self.manager.num_loading == 0
        assert self.tickets == []
        assert self.manager.num_reading == 0
        for name in self.names():
            self.manager.pin(name, False)
            self.manager.unload(name)
        self.drain()
        self.manager.check_integrity()
        assert self.manager.list() == []
        assert self.manager.stats().host_bytes == 0
        assert self.manager.stats().slots_used == 0


def test_manager_machine(specs: list[LinearSpec], write_adapter: Any) -> None:
    run_state_machine_as_test(
        lambda: ManagerMachine(specs, write_adapter),
        settings=settings(max_examples=60, stateful_step_count=30, deadline=None),
    )
