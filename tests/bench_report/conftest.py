"""A fake of two servers whose difference is known: records as a load generator writes them, with no server at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from specserve.bench.records import Comparison, Event, Load, RequestRecord, RunRecord, VariantInfo


@dataclass(frozen=True)
class Fake:
    """B is `speedup` times as fast as A. Everything else is noise, of logarithms: standard deviations."""

    speedup: float = 1.25
    rounds: int = 5
    requests: int = 40  # a run
    same_trace: bool = True  # every round sends the same requests; else each its own
    drift: float = 0.2  # of the machine from round to round, which A and B share
    block: float = 0.02  # of a run, which its requests share
    request: float = 0.05  # of a request's gain: some gain more from B than others
    noise: float = 0.05  # of a single answer
    lengths: float = 0.3  # of requests, the same for both
    tokens: int = 6

    def runs(self, seed: int, load: Load | None = None) -> list[RunRecord]:
        random = np.random.default_rng(seed)
        count = self.requests if self.same_trace else self.requests * self.rounds
        base = 0.5 * np.exp(random.normal(0, self.lengths, count))  # s
        gain = self.speedup * np.exp(random.normal(0, self.request, count))
        runs = []
        for number in range(self.rounds):
            start = 0 if self.same_trace else number * self.requests
            indices = range(start, start + self.requests)
            machine = random.normal(0, self.drift)
            for variant, faster in (("A", np.ones(count)), ("B", gain))[:: 1 if number % 2 else -1]:
                pace = np.exp(machine + random.normal(0, self.block) + random.normal(0, self.noise, count))
                runs.append(self._run(variant, number, indices, base * pace / faster, load or {"concurrency": 8}))
        return runs

    def _run(self, variant: str, number: int, indices: Sequence[int], seconds: np.ndarray, load: Load) -> RunRecord:
        records = []
        for index in indices:
            ends = 1.0 + seconds[index] * np.linspace(0.2, 1.0, self.tokens)
            events = [Event(float(time), 1) for time in ends]
            records.append(
                RequestRecord(index, 1.0, events, float(ends[-1]), 10, self.tokens, f"answer {index}", "length")
            )
        return RunRecord(variant, number, load, float(sum(seconds[index] for index in indices)) / 8, records)

    def comparison(self, seed: int, loads: Sequence[Load] = ({"concurrency": 8},)) -> Comparison:
        runs = [run for number, load in enumerate(loads) for run in self.runs(seed + number, load)]
        return Comparison([VariantInfo("A", "no draft"), VariantInfo("B", "draft model")], runs)


@pytest.fixture(scope="session")
def fake() -> type[Fake]:
    return Fake
