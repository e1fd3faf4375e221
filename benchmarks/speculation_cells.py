"""Decode times under speculation: by mode and number of drafts (`modes`), and sampled beside greedy (`sampled`).

As in benchmarks/engine.py, in one engine for all cells:

    prefill_s = the better of ROUNDS runs of 1 new token,    total_s = the better of so many runs of `out` new tokens,
    decode_ms_per_tok = (total_s - prefill_s) / (out - 1), for each sequence of the batch.

A run of one token drafts nothing, so prefill_s holds for every number of drafts, and the draft's prefill is in the
difference. Cells with a fixed number of drafts, which show what the engine's choice should find, run once.

    ms_per_round = a run's (seconds - prefill_s) / (out - 1) · its tokens_per_round, the least of the runs,

is a step's time. With a fixed number k of drafts it does not depend on how many are accepted. So its ratio to the
greedy cell's is what sampling costs at equal tokens a round, and ms_at_alpha = ms_per_round / (1 + α + … + α^k) is
decode_ms_per_tok without the luck of few requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.adapter_setup import table, verdict
from benchmarks.engine import ROUNDS, Row
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.speculation_runs import AdapterKind, Cell, Sampling, Timed, drafting, run, warm_up
from benchmarks.speculation_setup import Bench, Twins

FIXED: tuple[AdapterKind, ...] = ("none", "companions")  # which modes are measured with every number of drafts
COMPARED = ("decode_ms_per_tok", "ms_per_round")
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "rejection", "coupled")


@dataclass(frozen=True, slots=True)
class Modes:
    """The engine's choice in every mode beside no drafts, then `ks` drafts a step."""

    batches: tuple[int, ...]
    inp: int
    out: int
    ks: tuple[int, ...]

    def cells(self) -> list[Cell]:
        kinds: tuple[tuple[AdapterKind, int | None], ...] = (
            ("none", 0), ("none", None), ("plain", 0), ("plain", None), ("companions", None)
        )  # fmt: skip
        chosen = [Cell(adapters, batch, drafts) for batch in self.batches for adapters, drafts in kinds]
        return chosen + [Cell(kind, batch, k) for kind in FIXED for batch in self.batches for k in self.ks]

    def measure(self, bench: Bench, engine: SpecserveEngine, twins: Twins) -> Iterator[Row]:
        timer = Timer(bench, engine, self.inp, self.out)
        for cell in self.cells():
            if not bench.clock.begin(cell):
                continue
            warm_up(engine, cell, timer.work, bench.loras)
            runs = [timer.run(cell, number) for number in range(1 if cell.drafts else ROUNDS)]
            yield {"section": "modes", **cell.facts, **timer.row(cell, runs), "twin": twins.get(cell)}


@dataclass(frozen=True, slots=True)
class Sampled:
    """Both methods of verification beside greedy, with the engine's choice and with `k` drafts."""

    batches: tuple[int, ...]
    inp: int
    out: int
    k: int

    def cells(self) -> list[Cell]:
        return [cell for group in self._groups() for cell in group]

    def _groups(self) -> list[list[Cell]]:
        """Cells that take turns."""
        return [
            [Cell("none", batch, drafts, sampling) for sampling in SAMPLINGS]
            for batch in self.batches
            for drafts in (None, self.k)
        ]

    def measure(self, bench: Bench, engine: SpecserveEngine, twins: Twins) -> Iterator[Row]:
        timer = Timer(bench, engine, self.inp, self.out)
        for cells in self._groups():
            if not bench.clock.begin(f"{cells[0]} and sampled"):
                continue
            for cell in cells:
                warm_up(engine, cell, timer.work, bench.loras)
            runs: dict[Cell, list[Timed]] = {cell: [] for cell in cells}
            for number in range(ROUNDS):
                for cell in cells:
                    runs[cell].append(timer.run(cell, number))
            rows = [timer.row(cell, runs[cell]) for cell in cells]
            for cell, row in zip(cells, rows, strict=True):
                of_greedy = {f"{name}_of_greedy": round(row[name] / rows[0][name], 4) for name in COMPARED}
                yield {"section": "sampled", **cell.facts, **row, **of_greedy, "twin": twins.get(cell)}


class Timer:
    """Times cells of one size; their prefill once for each batch and kind of adapters."""

    def __init__(self, bench: Bench, engine: SpecserveEngine, inp: int, out: int) -> None:
        self.work = bench.work(inp, out)
        self._bench, self._engine = bench, engine
        self._prefills: dict[tuple[AdapterKind, int], float] = {}

    def run(self, cell: Cell, number: int) -> Timed:
        return run(self._engine, cell, self.work, self._bench.loras, number)

    def row(self, cell: Cell, runs: Sequence[Timed]) -> Row:
        prefill, total = self._prefill(cell), min(one.seconds for one in runs)
        found = drafting([sequel for one in runs for sequel in one.sequels])
        out, facts = self.work.out, self._engine.facts()
        per_token = 1e3 / max(1, out - 1)
        rounds = [(one.seconds - prefill) * per_token * drafting(one.sequels)["tokens_per_round"] for one in runs]
        expected = math.fsum(self._bench.settings.alpha**place for place in range((cell.drafts or 0) + 1))
        return {
            "inp": self.work.inp, "out": out, "rounds": len(runs),
            "decode_ms_per_tok": round((total - prefill) * per_token, 3),
            "prefill_s": round(prefill, 4), "total_s": round(total, 4),
            "out_tok_s": round(cell.batch * out / total, 1), **found,
            "ms_per_round": round(min(rounds), 3),
            "ms_at_alpha": None if cell.drafts is None else round(min(rounds) / expected, 3),
            "draft_dtype": facts["draft_dtype"] if cell.drafts != 0 else None,
        }  # fmt: skip

    def _prefill(self, cell: Cell) -> float:
        key = (cell.adapters, cell.batch)
        if key not in self._prefills:
            one = self._bench.work(self.work.inp, 1)
            self._prefills[key] = min(
                run(self._engine, cell, one, self._bench.loras, number).seconds for number in range(ROUNDS)
            )
        return self._prefills[key]


def modes_table(rows: Sequence[Row]) -> str:
    head = ("mode", "batch", "k", "ms/token", "total s", "tokens/s", "mean k", "tokens/round", "accepted", "twin")
    cells = [
        (
            row["mode"], row["batch"], row["k"], row["decode_ms_per_tok"], row["total_s"], row["out_tok_s"],
            row["k_mean"], row["tokens_per_round"], row["accepted_share"], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells) + "\n\n" + _choices(rows)


def _choices(rows: Sequence[Row]) -> str:
    """The engine's choice beside the best fixed number, the latter none included."""
    head = ("mode", "batch", "auto ms/token", "mean k", "best k", "its ms", "auto of best")
    lines = []
    for auto in (row for row in rows if row["k"] == "auto"):
        fixed = [row for row in rows if row["batch"] == auto["batch"] and _comparable(row, auto)]
        if fixed:
            best = min(fixed, key=lambda row: float(row["decode_ms_per_tok"]))
            ratio = round(auto["decode_ms_per_tok"] / best["decode_ms_per_tok"], 3)
            own = (auto["mode"], auto["batch"], auto["decode_ms_per_tok"], auto["k_mean"])
            lines.append((*own, best["k"], best["decode_ms_per_tok"], ratio))
    return table(head, lines)


def _comparable(fixed: Row, auto: Row) -> bool:
    """Without drafts companions are idle, and measured as if there were none."""
    same = fixed["adapters"] == auto["adapters"] or (
        fixed["k"] == 0 and "none" not in (fixed["adapters"], auto["adapters"])
    )
    return fixed["k"] != "auto" and same


def sampled_table(rows: Sequence[Row]) -> str:
    head = ("sampling", "batch", "k", "ms/token", "of greedy", "a round, of it", "tokens/round", "accepted", "twin")
    cells = [
        (
            row["sampling"], row["batch"], row["k"], row["decode_ms_per_tok"], row["decode_ms_per_tok_of_greedy"],
            row["ms_per_round_of_greedy"], row["tokens_per_round"], row["accepted_share"], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)
