"""What a batch's adapters cost: decode and prefill beside the base model's, by mix and by ranks, in one engine each.

    cost_ms = decode_ms_per_tok - the base model's,    floor_ms = bytes of the batch's adapters / 4.0 TB/s,
    over_floor = (cost_ms - floor_ms) / the base model's decode_ms_per_tok.

An adapter's bytes are those of its real rank, once a step, however many requests name it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.adapter_mixes import Listed, Mix
from benchmarks.adapter_setup import Adapters, Bench, table, verdict
from benchmarks.engine import Row, measure_cell, seconds
from benchmarks.engines import Assigned
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.long_context import COPY_BYTES

RANK = 16  # of the mixes' adapters
PREFILL_MIXES = ("base", "identical", "distinct")
PREFILL_ROUNDS = 5
MIXED_RANKS = (8, 16, 32, 64)
RANK_CELLS = {  # name → (first adapter, requests), each request on its own
    "32 of rank 16": (0, 32),
    "8 of rank 64": (32, 8),
    "8 of ranks 8 to 64": (40, 8),
    "32 of ranks 8 to 64": (40, 32),
}
RANK_ADAPTERS = Adapters("ranks", (16,) * 32 + (64,) * 8 + MIXED_RANKS * 8)


@dataclass(frozen=True, slots=True)
class BatchCell:
    """One batch to be measured."""

    name: str
    batch: int
    assigned: Assigned

    @property
    def adapters(self) -> list[str | None]:
        return self.assigned.adapters(self.batch)


def mix_cells(batches: Sequence[int], mixes: Sequence[str], loras: int) -> Iterator[BatchCell]:
    """The base model first. All mixes of one request are the same: only `identical` is left of them."""
    for batch in batches:
        names = ["base", *(name for name in mixes if name != "base" and (batch > 1 or name == "identical"))]
        yield from (BatchCell(name, batch, Mix(name, loras)) for name in names)


def rank_cells() -> Iterator[BatchCell]:
    for batch in sorted({count for _, count in RANK_CELLS.values()}):
        yield BatchCell("base", batch, Mix("base", 0))
        for name, (first, count) in RANK_CELLS.items():
            if count == batch:
                yield BatchCell(name, batch, Listed(tuple(f"a{first + i}" for i in range(count))))


def measure_decode(bench: Bench, section: str, adapters: Adapters, slots: int, cells: Sequence[BatchCell]) -> list[Row]:
    """Every cell as benchmarks/engine.py measures it, after the same batch was right on the twin."""
    twins = bench.check(adapters, slots, {(cell.name, cell.batch): cell.adapters for cell in cells})
    engine = bench.open(adapters, slots)
    rows: list[Row] = []
    bases: dict[int, Row] = {}
    rng = random.Random()
    try:
        for cell in cells:
            row = measure_cell(engine, cell.assigned, cell.batch, bench.work, rng)
            base = bases.setdefault(cell.batch, row)
            row = {"section": section, "cell": cell.name, "slots": slots, **adapters.facts, **row}
            row |= costs(bench, adapters, cell, row, base) | {"twin": twins.get((cell.name, cell.batch))}
            rows.append(row)
            bench.emit(row)
    finally:
        engine.close()
    return rows


def costs(bench: Bench, adapters: Adapters, cell: BatchCell, row: Row, base: Row) -> Row:
    """Beside the base model's row of the same batch."""
    live = {int(name[1:]) for name in cell.adapters if name is not None}
    live_bytes = sum(bench.adapter_bytes(adapters.ranks[number]) for number in live)
    floor = live_bytes / COPY_BYTES * 1e3
    cost = row["decode_ms_per_tok"] - base["decode_ms_per_tok"]
    return {
        "live_adapters": len(live), "live_bytes": live_bytes, "floor_ms": round(floor, 3), "cost_ms": round(cost, 3),
        "decode_of_base": round(row["decode_ms_per_tok"] / base["decode_ms_per_tok"], 4),
        "prefill_of_base": round(row["prefill_s"] / base["prefill_s"], 4),
        "over_floor": round((cost - floor) / base["decode_ms_per_tok"], 4),
    }  # fmt: skip


def measure_mixes(bench: Bench, mixes: Sequence[str]) -> list[Row]:
    """The popularity mixes, with a slot for each adapter that a batch may name."""
    loras = max(8, *bench.batches)
    cells = list(mix_cells(bench.batches, mixes, loras))
    return measure_decode(bench, "mixes", Adapters("mixes", (RANK,) * loras), loras, cells)


def measure_ranks(bench: Bench) -> list[Row]:
    """Many ranks, large ranks and mixed ones: real ranks cost real bytes, and little else."""
    return measure_decode(bench, "ranks", RANK_ADAPTERS, 32, list(rank_cells()))


def measure_prefill(bench: Bench, checked: Sequence[Row]) -> list[Row]:
    """Prompts' seconds to their first tokens. Mixes take turns, so that what drifts drifts for all of them. What the
    rows `checked` of the mixes say of the twin is not asked again."""
    loras = max(8, *bench.batches)
    adapters = Adapters("mixes", (RANK,) * loras)
    cells = list(mix_cells(bench.batches, PREFILL_MIXES, loras))
    twins = {(row["cell"], row["batch"]): row["twin"] for row in checked}
    unchecked = {(cell.name, cell.batch): cell.adapters for cell in cells if (cell.name, cell.batch) not in twins}
    twins |= bench.check(adapters, loras, unchecked)
    engine = bench.open(adapters, loras)
    rows: list[Row] = []
    try:
        for batch in bench.batches:
            own = [cell for cell in cells if cell.batch == batch]
            taken = _prefills(bench, engine, own)
            for cell in own:
                row: Row = {"section": "prefill", "cell": cell.name, "slots": loras, **adapters.facts}
                row |= {
                    "batch": batch, "inp": bench.inp, "rounds": PREFILL_ROUNDS,
                    "prefill_s": round(min(taken[cell.name]), 5), "median_s": round(median(taken[cell.name]), 5),
                    "prefill_of_base": round(min(taken[cell.name]) / min(taken["base"]), 4),
                    "median_of_base": round(median(taken[cell.name]) / median(taken["base"]), 4),
                    "twin": twins.get((cell.name, batch)),
                }  # fmt: skip
                rows.append(row)
                bench.emit(row)
    finally:
        engine.close()
    return rows


def _prefills(bench: Bench, engine: SpecserveEngine, cells: Sequence[BatchCell]) -> Mapping[str, list[float]]:
    """Seconds of every round, by the cell's name."""
    work, rng = replace(bench.work, out=1), random.Random()
    for cell in cells:
        seconds(engine, cell.assigned, cell.batch, work, rng)  # adapters come to the device
    taken: dict[str, list[float]] = {cell.name: [] for cell in cells}
    for _ in range(PREFILL_ROUNDS):
        for cell in cells:
            taken[cell.name].append(seconds(engine, cell.assigned, cell.batch, work, rng))
    return taken


def decode_table(rows: Sequence[Row]) -> str:
    head = ("cell", "batch", "ms/token", "of base", "cost ms", "floor ms", "over floor", "prefill s", "of base", "twin")
    cells = [
        (
            row["cell"], row["batch"], row["decode_ms_per_tok"], row["decode_of_base"], row["cost_ms"], row["floor_ms"],
            row["over_floor"], row["prefill_s"], row["prefill_of_base"], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)


def prefill_table(rows: Sequence[Row]) -> str:
    head = ("cell", "batch", "prefill s", "median s", "of base", "medians'", "twin")
    cells = [
        (
            row["cell"], row["batch"], row["prefill_s"], row["median_s"], row["prefill_of_base"],
            row["median_of_base"], verdict(row["twin"]),
        )
        for row in rows
    ]  # fmt: skip
    return table(head, cells)
