"""The host tier's memory against a plain model: regions never overlap, and what is freed is room again."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specserve_adapters.host_memory import HostMemory, Region

PIECE, PIECES = 4096, 3


class Owner:
    """Something that can die."""


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.memory = HostMemory(PIECE * (PIECES - 1) - 100, pin=True, piece_bytes=PIECE, allocate=self.allocate)
        self.held: list[tuple[Region, Owner, int]] = []
        self.next = 0

    def allocate(self, size: int) -> torch.Tensor:
        self.asked.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    @rule(size=st.integers(1, 5000))
    def take(self, size: int) -> None:
        region, owner = self.memory.take(size), Owner()
        self.memory.bind(region, owner)
        assert region.memory.shape == (size,)
        self.next = (self.next + 1) % 256
        region.memory.fill_(self.next)
        self.held.append((region, owner, self.next))

    @precondition(lambda self: self.held)
    @rule(choice=st.integers(0, 99))
    def die(self, choice: int) -> None:
        self.held.pop(choice % len(self.held))

    @precondition(lambda self: self.held)
    @rule()
    def all_die(self) -> None:
        self.held.clear()
        assert self.memory.free_bytes() == PIECE * len([size for size in self.asked if size == PIECE])

    @invariant()
    def nobody_is_overwritten(self) -> None:
        for region, _, value in self.held:
            assert bool((region.memory == value).all())
        assert self.asked.count(PIECE) >= PIECES  # taken at the start
        parted = [region for region, _, _ in self.held if region.piece is not None]
        places = sorted((region.piece or 0, region.start, region.size) for region in parted)
        for (piece, start, size), (other, other_start, _) in pairwise(places):
            assert start % 256 == 0
            assert piece < other or start + size <= other_start


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_adapters_of_one_size_fill_the_pieces() -> None:
    asked: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    memory = HostMemory(PIECE, pin=True, piece_bytes=PIECE, allocate=allocate)
    held = [memory.take(PIECE // 4) for _ in range(8)]
    assert asked == [PIECE, PIECE]
    memory.take(PIECE // 4)  # the budget is exceeded, as it may be for a while
    assert asked == [PIECE, PIECE, PIECE // 4]
    for region in held[2:6]:
        memory.free(region)
    assert memory.take(PIECE // 2).piece == 0
    assert memory.take(PIECE // 2).piece == 1
    assert memory.take(2 * PIECE).piece is None


def test_memory_that_is_not_pinned_is_nobodys() -> None:
    memory = HostMemory(PIECE, pin=False)
    region = memory.take(100)
    assert region.piece is None
    memory.free(region)
    assert memory.free_bytes() == 0


def test_a_small_budget_takes_small_pieces() -> None:
    asked: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    HostMemory(3 << 20, pin=True, allocate=allocate)
    assert asked == [4 << 20] * 2
