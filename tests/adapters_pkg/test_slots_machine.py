"""SlotTable under random takes, releases, pins and forgets, against a model that knows what may be given away."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specserve_adapters.slots import SlotTable

VERSIONS = st.sampled_from("abcdef")


class SlotMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(3)
        self.held: dict[str, int] = {}  # version → slot, least recently used first
        self.uses: Counter[str] = Counter()
        self.loads: list[tuple[int, str]] = []  # under way, in order
        self.contents: dict[int, str] = {}  # what each slot really holds

    def movable(self) -> list[str]:
        return [v for v in self.held if not self.uses[v] and v not in self.table.pinned]

    @rule(version=VERSIONS)
    def take(self, version: str) -> None:
        can = version in self.held or len(self.held) < 3 or bool(self.movable())
        assert self.table.can_take([version]) == can
        taken = self.table.take(version)
        assert (taken is not None) == can
        if taken is None:
            return
        slot, needs_load, evicted = taken
        assert needs_load == (version not in self.held)
        if needs_load:
            assert evicted == (self.movable()[0] if len(self.held) == 3 else None)  # the one used longest ago
            if evicted is not None:
                assert self.held.pop(evicted) == slot
            assert slot not in self.held.values()
            self.loads.append((slot, version))
        else:
            assert self.held.pop(version) == slot
        self.held[version] = slot
        self.uses[version] += 1

    @precondition(lambda self: any(self.uses.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(sorted(self.uses.elements())))
        self.table.release(version)
        self.uses[version] -= 1
        self.held[version] = self.held.pop(version)

    @precondition(lambda self: self.loads)
    @rule()
    def end_a_load(self) -> None:
        slot, version = self.loads.pop(0)
        self.contents[slot] = version
        self.table.loaded(slot)

    @rule(version=VERSIONS)
    def forget(self, version: str) -> None:
        if not self.uses[version]:
            assert self.table.forget(version) == (version in self.held)
            self.held.pop(version, None)

    @rule(versions=st.frozensets(VERSIONS, max_size=3))
    def pin(self, versions: frozenset[str]) -> None:
        self.table.pinned = versions

    @rule(versions=st.sets(VERSIONS, max_size=4))
    def can_take_together(self, versions: set[str]) -> None:
        kept = versions | {v for v in self.held if v not in self.movable()}
        assert self.table.can_take(versions) == (len(kept) <= 3)

    @invariant()
    def agrees(self) -> None:
        self.table.check_integrity()
        assert {v: self.table.slot_of(v) for v in self.table} == self.held
        assert all(self.table.uses(v) == self.uses[v] for v in "abcdef")
        assert self.table.num_loading == len(self.loads)
        for version, slot in self.held.items():
            under_way = any(loading == slot for loading, _ in self.loads)
            assert self.table.is_live(version) == (not under_way)
            assert under_way or self.contents[slot] == version


TestSlotMachine = SlotMachine.TestCase
TestSlotMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_misuse_is_our_bug() -> None:
    table = SlotTable(1)
    table.take("a")
    with pytest.raises(AssertionError):
        table.forget("a")
    table.release("a")
    with pytest.raises(AssertionError):
        table.release("a")
