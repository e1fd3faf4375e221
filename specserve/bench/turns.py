"""Who is measured when, so that what drifts (clocks, heat, neighbours) meets all variants alike."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from specserve.bench.records import Load

WARM_UP = -1  # the round of what is not counted


class Turn(msgspec.Struct, frozen=True):
    """One run: a variant under a load. Turns of one load and round send the same requests."""

    variant: str
    load: Load
    round: int

    @property
    def warm_up(self) -> bool:
        return self.round == WARM_UP


def interleaved(names: Sequence[str], loads: Sequence[Load], rounds: int) -> list[Turn]:
    """A B, B A, A B, … at each load: a steady drift weighs on both sides alike over every two rounds.

    Rounds come outermost, so that what is cut short has something of every load.
    """
    turns = [Turn(name, load, WARM_UP) for load in loads for name in names]
    for number in range(rounds):
        turns += [Turn(name, load, number) for load in loads for name in _order(names, number)]
    return turns


def in_blocks(names: Sequence[str], loads: Sequence[Load], rounds: int) -> list[Turn]:
    """A's first half of the rounds, then B's, B's second half, then A's: as few restarts as still cancel a drift.

    Whoever is started is warmed up at every load again.
    """
    turns: list[Turn] = []
    halves = [range((rounds + 1) // 2), range((rounds + 1) // 2, rounds)]
    for number, half in enumerate(half for half in halves if half):
        for name in _order(names, number):
            if not turns or turns[-1].variant != name:  # B goes on: it runs already
                turns += [Turn(name, load, WARM_UP) for load in loads]
            turns += [Turn(name, load, part) for part in half for load in loads]
    return turns


def _order(names: Sequence[str], number: int) -> list[str]:
    return list(names) if number % 2 == 0 else list(reversed(names))
