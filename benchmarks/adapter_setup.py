"""What the sections of the adapters' benchmark share: its arguments, adapters on disk, and engines to run them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine import RESERVED_TOKENS, Row, Workload
from benchmarks.engines import Mode, Setup, release_memory
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.pair import weight_sources, write_adapters
from benchmarks.shapes import PairSettings, load_settings
from benchmarks.twin import Cell, check_cells

ITEMSIZE = {"bfloat16": 2, "float32": 4}
FILES = 8  # weights files of one rank in a collection; further adapters are links to them
HOST_SLACK = 1.15  # of what adapters weigh: what memory is rounded to


@dataclass(frozen=True, slots=True)
class Adapters:
    """A collection: a0 … of the pair's folder of that name."""

    name: str
    ranks: tuple[int, ...]

    def write(self, folder: Path, device: str, files: int | None) -> None:
        """Into a pair's folder, unless it is there; `files` weights files a rank."""
        settings = load_settings(folder)
        found = folder / self.name / "collection.json"
        content = {"ranks": list(self.ranks), "files": files}
        if found.exists() and json.loads(found.read_text()) == content:
            return
        shutil.rmtree(folder / self.name, ignore_errors=True)
        write_adapters(folder / self.name, settings, self.ranks, device, files)
        found.write_text(json.dumps(content))
        release_memory()

    @property
    def facts(self) -> Row:
        """What a row says of them. Links differ in a field of their settings that means nothing, so that each is an
        adapter of its own: read, kept and moved on its own."""
        files = len(set(weight_sources(self.ranks, FILES)))
        shared = f"{files} files under {len(self.ranks)} names" if files < len(self.ranks) else "each its own"
        return {"adapters": len(self.ranks), "ranks": sorted(set(self.ranks)), "weights": shared}


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the benchmark: `emit` keeps a row."""

    pair: Path
    twin: Path | None
    device: str
    batches: tuple[int, ...]
    inp: int
    out: int
    emit: Callable[[Row], None]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> PairSettings:
        return load_settings(self.pair)

    @property
    def work(self) -> Workload:
        return Workload(self.inp, self.out, self.settings.shape("target").vocab - RESERVED_TOKENS)

    def adapter_bytes(self, rank: int, folder: Path | None = None) -> int:
        """Of one adapter, in memory or as a step reads it."""
        settings = load_settings(folder or self.pair)
        return settings.shape("target").lora_weights(rank) * ITEMSIZE[settings.dtype]

    def setup(
        self, folder: Path, adapters: Adapters, slots: int, host_share: float = 1.0, max_rows: int = 256
    ) -> Setup:
        """An engine of all these adapters, `slots` of them on the device and a share of their bytes on the host, for
        `max_rows` requests at a time."""
        # The twin's are different throughout: no two may be taken for one another.
        adapters.write(folder, self.device, FILES if folder == self.pair else None)
        weights = [self.adapter_bytes(rank, folder) for rank in adapters.ranks]
        options = {
            "max_loras": slots, "max_lora_rank": max(adapters.ranks),
            "max_host_lora_bytes": int(sum(weights) * host_share * HOST_SLACK) + max(weights),
        }  # fmt: skip
        return Setup(
            folder, Mode(len(adapters.ranks), 0), self.device, load_settings(folder).dtype,
            collection=adapters.name, max_num_seqs=max_rows, options=options | dict(self.options),
        )  # fmt: skip

    def open(self, adapters: Adapters, slots: int, host_share: float = 1.0, max_rows: int = 256) -> SpecserveEngine:
        """On the pair; what a closed engine held is free before."""
        release_memory()
        return SpecserveEngine(self.setup(self.pair, adapters, slots, host_share, max_rows))

    def check(
        self, adapters: Adapters, slots: int, cells: Mapping[Cell, Sequence[str | None]], host_share: float = 1.0
    ) -> Mapping[Cell, Row]:
        """Outcomes on the sensitive twin, with the same slots; {} without one."""
        if self.twin is None or not cells:
            return {}
        release_memory()
        return check_cells(self.setup(self.twin, adapters, slots, host_share), cells)


def verdict(twin: Mapping[str, Any] | None) -> str:
    """A twin's outcome for people."""
    return "-" if twin is None else "passed" if twin["passed"] else "FAILED"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows for people; the first column is the widest."""
    lines = [f"{cells[0]!s:<22}" + "".join(f"{cell!s:>13}" for cell in cells[1:]) for cells in (head, *rows)]
    return "\n".join(lines)
