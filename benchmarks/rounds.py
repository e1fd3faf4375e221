"""What a round of drafts takes in steady state, and where: one engine, several cells.

    python -m benchmarks.rounds PAIR [--cells none:8:4,companions:8:4,none:1:auto] [--options JSON] [--trace FOLDER]
        [--results FILE]

A cell is adapters (none, plain, companions), requests at a time and drafts a step (auto: the engine's choice; 0: none).
Its requests decode long enough for all steps, the same prompts for every cell of a batch. ms a step is the median of
ROUNDS times STEPS steps, each ended by waiting for the device; divided by the tokens that a request got in one, it is
the time of a token. That is quicker to find out than benchmarks/speculation.py's figures, of whole answers, which are
those to be compared with others'. With --trace some more steps are recorded, and the table of each cell is printed.

The pair's outputs do not tell whether the engine is right: see benchmarks/twin.py for what does.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from msgspec import structs

from benchmarks.engine import Row
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.record import append, surroundings
from benchmarks.speculation_runs import AdapterKind, Cell
from benchmarks.speculation_setup import Bench, Clock
from benchmarks.step_profile import record
from specserve.engine.core.core import EngineCore

ROUNDS, STEPS, SETTLING = 3, 12, 12
Stepping = Callable[[EngineCore], int]


def parse_cell(text: str) -> Cell:
    """ "companions:8:auto"."""
    kind, batch, drafts = text.split(":")
    if kind not in get_args(AdapterKind):
        raise argparse.ArgumentTypeError(f"{kind!r} is none of {', '.join(get_args(AdapterKind))}.")
    return Cell(kind, int(batch), None if drafts == "auto" else int(drafts))  # type: ignore[arg-type]


def parse_cells(text: str) -> list[Cell]:
    return [parse_cell(one) for one in text.split(",")]


def step(core: EngineCore) -> int:
    """One step of the engine; how many tokens were told."""
    outputs = core.step()
    core.poll_replies()
    for output in outputs:
        if output.error is not None:
            raise output.error.to_error()
    return sum(len(output.token_ids) for output in outputs)


def fill(engine: SpecserveEngine, bench: Bench, cell: Cell, inp: int) -> list[str]:
    """A cell's requests, decoding; their ids."""
    core, work = engine.core, bench.work(inp, 1)
    params = structs.replace(cell.params, max_tokens=core.ready.max_model_len - inp, ignore_eos=True)
    requests = engine.requests(
        work.prompts(cell.batch, random.Random(f"{cell.batch} 1")), cell.names(bench.loras), params
    )
    for request in requests:
        core.add_request(request)
    while core.scheduler.waiting or any(request.prefilling for request in core.scheduler.running):
        step(core)
    for _ in range(SETTLING):
        step(core)
    return [request.request_id for request in requests]


def measure(engine: SpecserveEngine, cell: Cell) -> Row:
    core = engine.core
    on_gpu = core.built.device.type == "cuda"
    taken, tokens = [], 0
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        tokens += sum(step(core) for _ in range(STEPS))
        if on_gpu:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - begin) / STEPS * 1e3)
    each = tokens / (ROUNDS * STEPS * cell.batch)
    milliseconds = statistics.median(taken)
    return {
        **cell.facts, "ms_step": round(milliseconds, 4), "ms_step_min": round(min(taken), 4),
        "ms_step_max": round(max(taken), 4), "tokens_per_step": round(each, 3),
        "ms_per_token": round(milliseconds / each, 4),
    }  # fmt: skip


def empty(engine: SpecserveEngine, ids: Sequence[str]) -> None:
    engine.core.abort_requests(list(ids))
    while engine.core.has_work():
        step(engine.core)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    default = ",".join(f"{kind}:{batch}:auto" for batch in (1, 8, 32, 128) for kind in ("none", "companions"))
    parser.add_argument("--cells", type=parse_cells, default=parse_cells(default))
    parser.add_argument("--inp", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the engine's own settings, kept in rows")
    parser.add_argument("--trace", type=Path, help="folder for a trace of each cell; also prints its table")
    parser.add_argument("--results", type=Path, default=Path("build/rounds.jsonl"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    bench = Bench(args.pair, None, args.device, Clock(), args.options)
    engine = bench.open()
    try:
        bench.clock.say(f"open: {engine.facts()}")
        for cell in args.cells:
            ids = fill(engine, bench, cell, args.inp)
            row = {**surroundings(args.device), **engine.facts(), "options": args.options, **measure(engine, cell)}
            append(args.results, row)
            bench.clock.say(
                f"{cell}: {row['ms_step']} ms a step ({row['ms_step_min']} to {row['ms_step_max']}), "
                f"{row['tokens_per_step']} tokens: {row['ms_per_token']} ms a token"
            )
            if args.trace is not None:
                name = f"{cell.adapters}-{cell.batch}-{cell.k}.json.gz"
                print(record(engine.core, STEPS // 2, args.trace / name), flush=True)
            empty(engine, ids)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
