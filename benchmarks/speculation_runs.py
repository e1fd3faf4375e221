"""One batch of speculation's benchmark: what its requests ask for, a run of it, and what its drafting came to."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from msgspec import structs

from benchmarks.engine import Row, Workload
from benchmarks.engines.specserve import Sequel, SpecserveEngine
from benchmarks.twin import FORCED
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS, MAX_POSITIONS

TEMPERATURE, TOP_P = 0.8, 0.95  # of sampled cells
WARM_UP_PROMPT, WARM_UP_TOKENS = 64, 16
AdapterKind = Literal["none", "plain", "companions"]
Sampling = Literal["greedy", "rejection", "coupled"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One batch: which adapters, drafts a step (None: the engine's choice), how tokens are chosen."""

    adapters: AdapterKind
    batch: int
    drafts: int | None
    sampling: Sampling = "greedy"

    @property
    def mode(self) -> str:
        speculates = self.drafts != 0
        return {
            "none": "draft" if speculates else "base",
            "plain": "both, no companions" if speculates else "adapters",
            "companions": "both" if speculates else "adapters, companions idle",
        }[self.adapters]

    @property
    def k(self) -> int | str:
        return "auto" if self.drafts is None else self.drafts

    @property
    def params(self) -> SamplingParams:
        asked = SpeculationParams(num_draft_tokens=self.drafts)
        if self.sampling == "greedy":
            return SamplingParams(temperature=0.0, speculation=asked)
        asked = structs.replace(asked, method=self.sampling)
        return SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, speculation=asked)

    def names(self, loras: int) -> list[str | None]:
        """Each request's adapter, of `loras` that have companions and as many that have none."""
        if self.adapters == "none":
            return [None] * self.batch
        first = loras if self.adapters == "plain" else 0
        return [f"a{first + index % loras}" for index in range(self.batch)]

    @property
    def forced(self) -> Cell:
        """With a number of drafts that the engine might have chosen."""
        return replace(self, drafts=min(FORCED, most_drafts(self.batch)))

    @property
    def facts(self) -> Row:
        return {
            "mode": self.mode, "adapters": self.adapters, "batch": self.batch, "k": self.k, "sampling": self.sampling
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mode}, {self.sampling}, batch {self.batch}, k = {self.k}"


def most_drafts(batch: int) -> int:
    """The most that the engine chooses for a row of such a batch."""
    return min(MAX_AUTO_DRAFTS, max(1, MAX_POSITIONS // batch - 1))


class Timed(NamedTuple):
    """One run: seconds of all of it, and what each request got."""

    seconds: float
    sequels: list[Sequel]


def run(engine: SpecserveEngine, cell: Cell, work: Workload, loras: int, number: int) -> Timed:
    """Run `number` of a cell. All cells of a batch get the same prompts, and so the same luck: which drafts are
    accepted depends on the tokens before them."""
    rng = random.Random(f"{cell.batch} {number}")
    params = structs.replace(cell.params, max_tokens=work.out, ignore_eos=True)
    requests = engine.requests(work.prompts(cell.batch, rng), cell.names(loras), params)
    begin = time.perf_counter()
    sequels = engine.run(requests)
    taken = time.perf_counter() - begin
    if any(len(sequel.token_ids) != work.out for sequel in sequels):
        raise RuntimeError(f"{cell}: not every request got its {work.out} tokens.")
    return Timed(taken, sequels)


def warm_up(engine: SpecserveEngine, cell: Cell, work: Workload, loras: int) -> None:
    """What only a first run has: programs that are compiled, adapters that come to their slots."""
    short = Workload(min(WARM_UP_PROMPT, work.inp), min(WARM_UP_TOKENS, work.out), work.vocab)
    run(engine, cell, short, loras, number=0)


def drafting(sequels: Sequence[Sequel]) -> Row:
    """Means over the steps that gave a request a token after its first: k_mean drafts, tokens_per_round tokens; and
    which share of drafts was accepted, in all and by position (of those drafted there)."""
    steps = sum(len(set(sequel.arrivals)) - 1 for sequel in sequels)
    tokens = sum(len(sequel.token_ids) - 1 for sequel in sequels)
    stats = [sequel.speculation for sequel in sequels if sequel.speculation is not None]
    drafted = _added([one.drafted_per_position for one in stats])
    accepted = _added([one.accepted_per_position for one in stats])
    return {
        "k_mean": round(sum(drafted) / max(1, steps), 3), "tokens_per_round": round(tokens / max(1, steps), 3),
        "accepted_share": round(sum(accepted) / max(1, sum(drafted)), 4),
        "accepted_per_position": [
            round(taken / made, 4) for taken, made in zip(accepted, drafted, strict=True) if made
        ],
    }  # fmt: skip


def _added(counts: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, counts), default=0)
    return [sum(one[place] for one in counts if place < len(one)) for place in range(longest)]
