"""What everybody in a round shares."""

from __future__ import annotations

import random
from collections import Counter, deque

from specserve.llm import LLM
from stresskit.books import Books
from stresskit.ledger import Ledger

NAMES = tuple(f"n{i}" for i in range(8))


class Scene:
    """One engine, its one source of chance, the accounts, and a log of what was done last."""

    def __init__(self, llm: LLM, rng: random.Random) -> None:
        self.engine, self.rng = llm.engine, rng
        self.ledger = Ledger()
        self.books = Books(llm, self.ledger)
        self.counts: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=60)
        self._ids = 0

    def next_id(self) -> int:
        """Of a request or a call."""
        self._ids += 1
        return self._ids

    def note(self, what: str) -> None:
        self.log.append(f"{self.ledger.now}: {what}")
