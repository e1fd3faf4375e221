"""How soon does the engine notice that an adapter's drafts are accepted more often, or less?

All requests of a batch are on one adapter, drafted by its companion. While they decode, the draft's output head is
exchanged (draft_head.py), so that acceptance moves from one α to another between two steps. What counts is the expected
rate of the engine's choice, free of what happens to be accepted:

    rate(k) = (1 + α + … + α^k) / step_ms(k),

with step_ms(k) measured before, in the same engine, with k drafts that are never accepted (α = 0). The engine has found
the new best k, within 5 %, at the first step from which on at least 9 of 10 of the next 32 choices are as good as
NEAR · max rate: single steps are probes, or controls without drafts. Reported are the adapter's tokens until then.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

from msgspec import structs

from benchmarks.adapter_setup import table, verdict
from benchmarks.draft_head import DraftHead
from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.speculation_runs import Cell, most_drafts, warm_up
from benchmarks.speculation_setup import Bench, Twins
from specserve.core.sampling_params import SpeculationParams
from specserve.scheduling.acceptance import Acceptance

NEAR, STEADY, WINDOW = 0.95, 0.9, 32
STEPS = 24  # that tell how long one with k drafts takes
SKIPPED = 4  # before them: prompts, the draft's prefill


@dataclass(frozen=True, slots=True)
class Seen:
    """One step after the change: the adapter's tokens and the seconds since then, and the mean number of drafts chosen
    for its rows."""

    tokens: int
    seconds: float
    drafts: float


@dataclass(slots=True)
class Watch:
    """Called between steps: changes α once `before` tokens came from each request, and then notes the choices."""

    engine: SpecserveEngine
    head: DraftHead
    after_alpha: float
    before: int
    seen: list[Seen] = field(default_factory=list)
    chosen_before: list[float] = field(default_factory=list)
    probed: int = 0  # rows, when it changed
    _tokens: int = 0
    _began: float | None = None

    def __call__(self) -> None:
        scheduler = self.engine.core.scheduler
        running = [request for request in scheduler.requests.values() if not request.prefilling]
        drafts, tokens = scheduler.policy.mean_drafts, sum(request.num_output_tokens for request in running)
        if self._began is not None:
            if tokens > self._tokens + (self.seen[-1].tokens if self.seen else 0):  # none has ended
                self.seen.append(Seen(tokens - self._tokens, time.perf_counter() - self._began, drafts))
            return
        self.chosen_before.append(drafts)
        if running and min(request.num_output_tokens for request in running) >= self.before:
            self.head.exchange(self.after_alpha)
            self._tokens, self._began, self.probed = tokens, time.perf_counter(), scheduler.policy.probing.probes


@dataclass(frozen=True, slots=True)
class Shift:
    """Batches; (α before, α after); tokens of each prompt, and of each answer before and after the change."""

    batches: tuple[int, ...]
    alphas: tuple[tuple[float, float], ...]
    inp: int
    before: int
    after: int

    def cells(self) -> list[Cell]:
        return [Cell("companions", batch, None) for batch in self.batches]

    def measure(self, bench: Bench, engine: SpecserveEngine, twins: Twins) -> Iterator[Row]:
        own, draft_dtype = bench.settings.alpha, engine.facts()["draft_dtype"]
        head = DraftHead(engine, bench.settings, {0.0, own, *(alpha for pair in self.alphas for alpha in pair)})
        for cell in self.cells():
            if not bench.clock.begin(f"shift, batch {cell.batch}: what steps take"):
                continue
            head.exchange(0.0)
            step_ms = [self._step_ms(bench, engine, cell.batch, k) for k in range(most_drafts(cell.batch) + 1)]
            for old, new in self.alphas:
                if bench.clock.begin(f"shift, batch {cell.batch}: acceptance {old} → {new}"):
                    found = self._shift(bench, engine, head, cell, (old, new), step_ms)
                    about = {"inp": self.inp, "out": self.before + self.after, "draft_dtype": draft_dtype}
                    yield {"section": "shift", **cell.facts, **about, **found, "twin": twins.get(cell)}
        head.exchange(own)

    def _step_ms(self, bench: Bench, engine: SpecserveEngine, batch: int, drafts: int) -> float:
        """Of a step with so many drafts, none accepted, so that all requests' tokens come together."""
        cell, work, rng = Cell("companions", batch, drafts), bench.work(self.inp, SKIPPED + STEPS), random.Random()
        warm_up(engine, cell, work, loras=1)
        params = structs.replace(cell.params, max_tokens=work.out, ignore_eos=True)
        sequels = engine.run(engine.requests(work.prompts(batch, rng), cell.names(1), params))
        arrivals = sequels[0].arrivals[SKIPPED:]
        return 1e3 * median(after - before for before, after in pairwise(arrivals))

    def _shift(
        self,
        bench: Bench,
        engine: SpecserveEngine,
        head: DraftHead,
        cell: Cell,
        alphas: tuple[float, float],
        step_ms: Sequence[float],
    ) -> Row:
        old, new = alphas
        policy = engine.core.scheduler.policy
        policy.acceptance = Acceptance()  # nothing is known of what never was accepted above
        head.exchange(old)
        work = bench.work(self.inp, self.before + self.after)
        params = structs.replace(cell.params, max_tokens=work.out, ignore_eos=True, speculation=SpeculationParams())
        watch = Watch(engine, head, new, self.before)
        engine.run(engine.requests(work.prompts(cell.batch, random.Random()), cell.names(1), params), watch)
        rates = [expected(k, new) / milliseconds for k, milliseconds in enumerate(step_ms)]
        found = settled(watch.seen, rates)
        last = watch.seen[-len(watch.seen) // 4 :]
        return {
            "alpha": new, "alpha_before": old, "step_ms": [round(milliseconds, 3) for milliseconds in step_ms],
            "best_k": rates.index(max(rates)), "tokens_until": None if found is None else found.tokens,
            "seconds_until": None if found is None else round(found.seconds, 3),
            "steps": len(watch.seen), "tokens": watch.seen[-1].tokens if watch.seen else 0,
            "probed_rows": policy.probing.probes - watch.probed,
            "k_before": _mean(watch.chosen_before[-WINDOW:]), "k_after": _mean([one.drafts for one in last]),
            "rate_after": _mean([rate_of(one.drafts, rates) / max(rates) for one in last]),
        }  # fmt: skip


def expected(drafts: int, alpha: float) -> float:
    """Tokens of a round."""
    return math.fsum(alpha**position for position in range(drafts + 1))


def rate_of(drafts: float, rates: Sequence[float]) -> float:
    """Of a mean number of drafts: the line between those beside it."""
    low = min(int(drafts), len(rates) - 1)
    high = min(low + 1, len(rates) - 1)
    return rates[low] + (drafts - low) * (rates[high] - rates[low])


def settled(seen: Sequence[Seen], rates: Sequence[float]) -> Seen | None:
    """The first step from which on the choices are near the best; None if they never are."""
    good = [rate_of(one.drafts, rates) >= NEAR * max(rates) for one in seen]
    for place, one in enumerate(seen[: -WINDOW + 1]):
        if good[place] and mean(good[place : place + WINDOW]) >= STEADY:
            return one
    return None


def _mean(values: Sequence[float]) -> float | None:
    return round(mean(values), 3) if values else None


def shift_table(rows: Sequence[Row]) -> str:
    head = ("from → to", "batch", "tokens until", "a request", "s until", "k before", "k after", "best k", "of best",
            "probed rows", "twin")  # fmt: skip
    cells = []
    for row in rows:
        until = row["tokens_until"]
        cells.append(
            (
                f"{row['alpha_before']} → {row['alpha']}", row["batch"], "never" if until is None else until,
                "" if until is None else round(until / row["batch"]), row["seconds_until"], row["k_before"],
                row["k_after"], row["best_k"], row["rate_after"], row["probed_rows"], verdict(row["twin"]),
            )
        )  # fmt: skip
    return table(head, cells)
