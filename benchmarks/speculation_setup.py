"""What the sections of speculation's benchmark share: the one engine that runs all cells, the twin, the clock."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.engine import RESERVED_TOKENS, Row, Workload
from benchmarks.engines import Mode, Setup, release_memory
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.shapes import PairSettings, load_settings
from benchmarks.speculation_runs import Cell
from benchmarks.twin import add_forced, check_cells

COLLECTION = "speculation"  # the pair's adapters with their companions, then the same without

Twins = Mapping[Cell, Row]


@dataclass(slots=True)
class Clock:
    """Says what begins, and ends a run in time: nothing begins after `minutes`; what has begun goes on to its end."""

    minutes: float | None = None
    left_out: list[str] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    def begin(self, what: object) -> bool:
        """Whether there is time for it."""
        if self.minutes is not None and self.seconds > 60 * self.minutes:
            self.left_out.append(str(what))
            return False
        self.say(what)
        return True

    def say(self, what: object) -> None:
        print(f"[{self.seconds:5.0f} s] {what}", flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the benchmark. All its cells share one engine: a request says how many drafts it wants."""

    pair: Path
    twin: Path | None
    device: str
    clock: Clock
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> PairSettings:
        return load_settings(self.pair)

    @property
    def loras(self) -> int:
        return self.settings.adapters

    def work(self, inp: int, out: int) -> Workload:
        return Workload(inp, out, self.settings.shape("target").vocab - RESERVED_TOKENS)

    def open(self) -> SpecserveEngine:
        """The pair's; what a closed engine held is free before."""
        release_memory()
        return SpecserveEngine(self._setup(self.pair))

    def check(self, cells: Sequence[Cell]) -> Twins:
        """Outcomes on the sensitive twin; {} without one. Cells that leave drafts to the engine must also be right
        where it has to draft."""
        chosen = [cell for cell in cells if cell.drafts is None]
        cells = list(dict.fromkeys([*cells, *(cell.forced for cell in chosen)]))
        if self.twin is None or not self.clock.begin(f"twin: {len(cells)} cells"):
            return {}
        if load_settings(self.twin).adapters != self.loras:
            raise SystemExit(f"{self.twin} and {self.pair} have different numbers of adapters.")
        found = check_cells(
            self._setup(self.twin),
            {cell: cell.names(self.loras) for cell in cells},
            asked={cell: cell.params for cell in cells},
        )
        passed = sum(outcome["passed"] for outcome in found.values())
        self.clock.say(f"{passed} of {len(found)} cells passed the twin")
        for cell in chosen:
            assert cell.forced.drafts is not None
            add_forced(found[cell], found[cell.forced], cell.forced.drafts)
        release_memory()
        return found

    def _setup(self, folder: Path) -> Setup:
        """Slots for one kind of adapters at a time, as many as other benchmarks' engines have."""
        settings = load_settings(folder)
        if not settings.companions:
            raise SystemExit(f"{folder} has no companions: write it with --companions.")
        _link_adapters(folder, settings.adapters)
        options = {"max_loras": max(8, settings.adapters)} | dict(self.options)
        mode = Mode(2 * settings.adapters, None)
        return Setup(folder, mode, self.device, settings.dtype, collection=COLLECTION, options=options)


class Section(Protocol):
    """A part of the benchmark: the cells that its figures rest on, and how they are measured."""

    def cells(self) -> Sequence[Cell]: ...

    def measure(self, bench: Bench, engine: SpecserveEngine, twins: Twins) -> Iterator[Row]:
        """Rows, as they come."""
        ...


def _link_adapters(folder: Path, loras: int) -> None:
    """The collection, as hard links: a0 … with companions, then as many without."""
    shutil.rmtree(folder / COLLECTION, ignore_errors=True)
    for number in range(loras):
        source, collection = folder / "lora" / f"a{number}", folder / COLLECTION
        without = shutil.ignore_patterns("draft")
        shutil.copytree(source, collection / f"a{number}", copy_function=os.link)
        shutil.copytree(source, collection / f"a{loras + number}", copy_function=os.link, ignore=without)
