"""Is speculation ever slower than none? Throughput over the total time, prefill included, by batch and acceptance.

In one engine runs without drafts and with the engine's choice at each α take turns, `rounds` times; the draft's output
head is exchanged in between (draft_head.py), and with it what the engine has learnt about acceptance, so that each α is
served by an engine that knows it. For each batch and α,

    speedup = median over rounds of (seconds without drafts / seconds with),    tok_s = batch · out / median seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.adapter_setup import table, verdict
from benchmarks.draft_head import DraftHead
from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.speculation_runs import Cell, Timed, drafting, run, warm_up
from benchmarks.speculation_setup import Bench, Twins
from specserve.scheduling.acceptance import Acceptance

Runs = dict[float | None, list[Timed]]  # by α; None: without drafts


@dataclass(frozen=True, slots=True)
class Curve:
    """Batches, acceptances, and the requests' sizes in tokens."""

    batches: tuple[int, ...]
    alphas: tuple[float, ...]
    inp: int
    out: int
    rounds: int

    def cells(self) -> list[Cell]:
        return [Cell("none", batch, drafts) for batch in self.batches for drafts in (0, None)]

    def measure(self, bench: Bench, engine: SpecserveEngine, twins: Twins) -> Iterator[Row]:
        draft = Draft(engine, bench, self.alphas)
        draft_dtype = engine.facts()["draft_dtype"]
        for batch in self.batches:
            off, auto = Cell("none", batch, 0), Cell("none", batch, None)
            if not bench.clock.begin(f"curve, batch {batch}"):
                continue
            runs = self._take_turns(bench, engine, draft, off, auto)
            for alpha in self.alphas:
                yield {
                    "section": "curve", **auto.facts, "inp": self.inp, "out": self.out, "rounds": self.rounds,
                    **compared(alpha, runs, batch * self.out), "draft_dtype": draft_dtype,
                    "twin": _both(twins.get(off), twins.get(auto)),
                }  # fmt: skip
        draft.be(bench.settings.alpha)

    def _take_turns(self, bench: Bench, engine: SpecserveEngine, draft: Draft, off: Cell, auto: Cell) -> Runs:
        work = bench.work(self.inp, self.out)
        runs: Runs = {alpha: [] for alpha in (None, *self.alphas)}
        for number in range(self.rounds + 1):
            for alpha in list(runs)[:: 1 if number % 2 else -1]:
                draft.be(alpha)
                cell = off if alpha is None else auto
                if number:
                    runs[alpha].append(run(engine, cell, work, bench.loras, number))
                else:
                    warm_up(engine, cell, work, bench.loras)
        return runs


class Draft:
    """A draft of several acceptances, and what an engine has learnt of each."""

    def __init__(self, engine: SpecserveEngine, bench: Bench, alphas: Sequence[float]) -> None:
        self._head = DraftHead(engine, bench.settings, {*alphas, bench.settings.alpha})
        self._policy = engine.core.scheduler.policy
        self._learnt = {alpha: Acceptance() for alpha in alphas} | {bench.settings.alpha: self._policy.acceptance}

    def be(self, alpha: float | None) -> None:
        """None: whatever it is. The engine must be idle."""
        if alpha is not None:
            self._head.exchange(alpha)
            self._policy.acceptance = self._learnt[alpha]


def compared(alpha: float, runs: Runs, tokens: int) -> Row:
    """Runs at one α beside those without drafts, which gave as many tokens each."""
    off, auto = ([one.seconds for one in runs[which]] for which in (None, alpha))
    ratios = [ours / theirs for ours, theirs in zip(off, auto, strict=True)]
    return {
        "alpha": alpha, "off_s": round(median(off), 4), "auto_s": round(median(auto), 4),
        "off_tok_s": round(tokens / median(off), 1), "auto_tok_s": round(tokens / median(auto), 1),
        "speedup": round(median(ratios), 4), "speedups": [round(ratio, 4) for ratio in ratios],
        **drafting([sequel for one in runs[alpha] for sequel in one.sequels]),
    }  # fmt: skip


def _both(off: Row | None, auto: Row | None) -> Row | None:
    """A figure that rests on two cells is right if both are."""
    if off is None or auto is None:
        return None  # there is no twin
    return {"passed": off["passed"] and auto["passed"], "off": off, "auto": auto}


def curve_table(rows: Sequence[Row]) -> str:
    head = ("alpha", "batch", "off tokens/s", "auto tokens/s", "speedup", "least", "mean k", "accepted 1st", "twin")
    cells = [
        (
            row["alpha"], row["batch"], row["off_tok_s"], row["auto_tok_s"], row["speedup"], min(row["speedups"]),
            row["k_mean"], (row["accepted_per_position"] or ["-"])[0], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)
