"""Decode and prefill times of one engine on a pair (benchmarks/pair.py), one JSON line a cell.

    python -m benchmarks.engine PAIR --mode lora8_spec4 [--batches 1,8,32,128] [--inp 512] [--out 256]
        [--engine specserve] [--twin TWIN] [--results FILE] [--check] [--long]

A cell is a mode and a batch size: so many prompts of random tokens, fresh each round, are given to the engine at once
and decoded greedily, end of text ignored, prefix cache off. After a warm-up,

    prefill_s = the better of two runs of 1 new token,    total_s = the better of two runs of `out` new tokens,
    decode_ms_per_tok = (total_s - prefill_s) / (out - 1), for each sequence of the batch.

With --twin, the same mode and batch sizes run first on the sensitive twin and must give the reference's
log-probabilities there (benchmarks/twin.py); the rows carry the outcome. --check adds questions of repeatability
(benchmarks/checks.py), --long a long context's prefill and decode (benchmarks/long_context.py).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import check_repeatability
from benchmarks.engines import NAMES, Assigned, Engine, Mode, Setup, open_engine, release_memory
from benchmarks.long_context import measure_long
from benchmarks.record import append, surroundings
from benchmarks.shapes import load_settings
from benchmarks.twin import check_twin

WARM_UP_TOKENS = 8
ROUNDS = 2
RESERVED_TOKENS = 256  # the vocabulary's last, where the special ones are
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes of the cells' requests, in tokens; `vocab` is what prompts are drawn from."""

    inp: int
    out: int
    vocab: int

    def prompts(self, count: int, rng: random.Random) -> list[list[int]]:
        return [[rng.randrange(self.vocab) for _ in range(self.inp)] for _ in range(count)]


def seconds(engine: Engine, mode: Assigned, batch: int, work: Workload, rng: random.Random) -> float:
    """Time of one run of `batch` fresh prompts."""
    prompts = work.prompts(batch, rng)
    begin = time.perf_counter()
    outputs = engine.generate(prompts, mode.adapters(batch), work.out)
    taken = time.perf_counter() - begin
    short = [len(tokens) for tokens in outputs if len(tokens) != work.out]
    if short or len(outputs) != batch:
        raise RuntimeError(f"{batch} requests of {work.out} tokens got {len(outputs)} outputs, of lengths {short}.")
    return taken


def measure_cell(engine: Engine, mode: Assigned, batch: int, work: Workload, rng: random.Random) -> Row:
    """Warm up, then time the cell; also the engine's own facts about the measured runs."""
    seconds(engine, mode, batch, replace(work, out=min(WARM_UP_TOKENS, work.out)), rng)
    engine.facts()  # counters start anew
    prefill = min(seconds(engine, mode, batch, replace(work, out=1), rng) for _ in range(ROUNDS))
    total = min(seconds(engine, mode, batch, work, rng) for _ in range(ROUNDS))
    return {
        "batch": batch, "inp": work.inp, "out": work.out,
        "decode_ms_per_tok": round((total - prefill) / max(1, work.out - 1) * 1e3, 3),
        "prefill_s": round(prefill, 4), "total_s": round(total, 4), "out_tok_s": round(batch * work.out / total, 1),
        **engine.facts(),
    }  # fmt: skip


def measure_mode(
    name: str, setup: Setup, batches: Sequence[int], work: Workload, emit: Callable[[Row], None], *, check: bool
) -> Row:
    """All cells of one mode on one engine; returns what `check` finds about its repeatability."""
    begin = time.perf_counter()
    engine = open_engine(name, setup)
    load = round(time.perf_counter() - begin, 1)
    rng = random.Random()
    try:
        first = max(8, setup.mode.loras)  # every adapter once
        seconds(engine, setup.mode, first, replace(work, out=min(16, work.out)), rng)
        for batch in batches:
            emit(measure_cell(engine, setup.mode, batch, work, rng) | {"load_s": load})
        return {"repeatable": check_repeatability(engine, setup.mode, work.vocab)} if check else {}
    finally:
        engine.close()
        del engine
        release_memory()


def measure_twin(setup: Setup, batches: Sequence[int], work: Workload, *, check: bool) -> tuple[dict[int, Row], Row]:
    """Outcomes by batch size, and what `check` finds on the twin."""
    found: Row = {}

    def also(engine: Engine) -> None:
        if check:
            found["twin_repeatable"] = check_repeatability(engine, setup.mode, work.vocab)

    return check_twin(setup, batches, also), found


def table(rows: Sequence[Row]) -> str:
    """Rows for people."""
    head = ("mode", "batch", "ms/token", "prefill s", "tokens/s", "tokens/round", "twin")
    lines = ["".join(f"{name:>14}" for name in head)]
    for row in rows:
        twin = row["twin"]
        cells = (
            row["mode"], row["batch"], row["decode_ms_per_tok"], row["prefill_s"], row["out_tok_s"],
            row.get("tokens_per_round", ""), "-" if twin is None else "passed" if twin["passed"] else "FAILED",
        )  # fmt: skip
        lines.append("".join(f"{cell!s:>14}" for cell in cells))
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--mode", required=True, help="one or more, with commas between: lora0_spec0,lora8_specauto")
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--inp", type=int, default=512)
    parser.add_argument("--out", type=int, default=256)
    parser.add_argument("--engine", default="specserve", choices=NAMES)
    parser.add_argument("--twin", type=Path, help="the sensitive twin's folder (specserve only)")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/engine.jsonl"))
    parser.add_argument("--check", action="store_true", help="also: are outputs repeatable, alone and in a batch?")
    parser.add_argument("--long", action="store_true", help="also: decode and prefill at 32k tokens")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the engine's own settings, kept in rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.engine != "specserve" and (args.twin or args.long):
        parser.error("--twin and --long look inside specserve.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a twin was not as the reference is."""
    args = arguments(argv)
    settings = load_settings(args.pair)
    batches = [int(batch) for batch in args.batches.split(",")]
    work = Workload(args.inp, args.out, settings.shape("target").vocab - RESERVED_TOKENS)
    rows: list[Row] = []
    for mode in map(Mode.parse, args.mode.split(",")):
        setup = Setup(args.pair, mode, args.device, settings.dtype, options=args.options)
        twin, extras = (
            measure_twin(replace(setup, pair=args.twin), batches, work, check=args.check) if args.twin else ({}, {})
        )
        same = {
            "engine": args.engine, "mode": str(mode), "pair": settings.target, "dtype": settings.dtype,
            "draft": settings.draft if mode.speculates else None,
            "draft_dtype": settings.dtype if mode.speculates else None,
            "alpha": settings.alpha, "options": args.options, **surroundings(args.device),
        }  # fmt: skip

        def emit(row: Row, same: Row = same, twin: dict[int, Row] = twin) -> None:
            rows.append(same | row | {"twin": twin.get(row["batch"])})
            append(args.results, rows[-1])
            print(json.dumps(rows[-1]), flush=True)

        extras |= measure_mode(args.engine, setup, batches, work, emit, check=args.check)
        if args.long:
            extras["long"] = measure_long(setup, settings)
        if extras:
            append(args.results, same | extras)
            print(json.dumps(same | extras), flush=True)
    print(table(rows))
    return int(any(row["twin"] is not None and not row["twin"]["passed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
