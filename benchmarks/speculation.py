"""What speculation gives, and that it never costs: one JSON line a row, tables at the end.

    python -m benchmarks.speculation PAIR [--twin TWIN] [--section modes,sampled,curve,shift] [--minutes 10]
        [--results FILE]

| Section | What |
|---|---|
| modes | ms/token by batch: no drafts, the engine's choice, 1 … 5 drafts; no adapters, adapters, with companions |
| sampled | at temperature 0.8, top_p 0.95: both methods beside greedy |
| curve | throughput over the total time, drafts left to the engine beside none, by batch and acceptance |
| shift | an adapter's acceptance moves while it is served: tokens until the engine drafts as many as are best |

PAIR and TWIN are made by benchmarks/pair.py, with companions. One engine runs all cells: each request says how many
drafts it wants. With --twin, each cell is first run on the sensitive twin and must be right there (benchmarks/twin.py).
Rows are kept as they come, and no cell begins after --minutes, so that a run cut short tells what it found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.adapters import names, numbers
from benchmarks.engine import Row
from benchmarks.record import append, surroundings
from benchmarks.shapes import load_settings
from benchmarks.speculation_cells import Modes, Sampled, modes_table, sampled_table
from benchmarks.speculation_curve import Curve, curve_table
from benchmarks.speculation_setup import Bench, Clock, Section
from benchmarks.speculation_shift import Shift, shift_table

TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "modes": modes_table,
    "sampled": sampled_table,
    "curve": curve_table,
    "shift": shift_table,
}


def shares(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


def moves(text: str) -> tuple[tuple[float, float], ...]:
    """ "0.3:0.8,0.8:0.3"."""
    pairs = [one.split(":") for one in text.split(",")]
    return tuple((float(before), float(after)) for before, after in pairs)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--twin", type=Path, help="the sensitive twin's folder")
    parser.add_argument("--section", type=names, default=tuple(TABLES), help="one or more, with commas between")
    parser.add_argument("--minutes", type=float, help="no cell begins after them; default: no limit")
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 128), help="of modes and sampled")
    parser.add_argument("--inp", type=int, default=512, help="of modes and sampled: tokens of a prompt")
    parser.add_argument("--out", type=int, default=256, help="of modes and sampled: new tokens")
    parser.add_argument("--ks", type=numbers, default=(1, 2, 3, 4, 5), help="of modes: fixed numbers of drafts")
    parser.add_argument("--sampled-k", type=int, default=4, help="of sampled: the fixed number of drafts")
    parser.add_argument("--curve-batches", type=numbers, default=(1, 2, 4, 8, 16, 32, 64, 128, 256))
    parser.add_argument("--curve-alphas", type=shares, default=(0.3, 0.5, 0.7, 0.9))
    parser.add_argument("--curve-inp", type=int, default=256)
    parser.add_argument("--curve-out", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="of curve: how often runs take turns")
    parser.add_argument("--shift-batches", type=numbers, default=(1, 8, 32))
    parser.add_argument("--shift-alphas", type=moves, default=moves("0.3:0.8,0.8:0.3"))
    parser.add_argument("--shift-inp", type=int, default=128)
    parser.add_argument("--shift-before", type=int, default=384, help="tokens of each answer before the change")
    parser.add_argument("--shift-after", type=int, default=1024, help="… and after it")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/speculation.jsonl"))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the engine's own settings, kept in rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if unknown := set(args.section) - TABLES.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}.")
    return args


def sections(args: argparse.Namespace) -> Mapping[str, Section]:
    """Those that were asked for."""
    every: dict[str, Section] = {
        "modes": Modes(args.batches, args.inp, args.out, args.ks),
        "sampled": Sampled(args.batches, args.inp, args.out, args.sampled_k),
        "curve": Curve(args.curve_batches, args.curve_alphas, args.curve_inp, args.curve_out, args.rounds),
        "shift": Shift(args.shift_batches, args.shift_alphas, args.shift_inp, args.shift_before, args.shift_after),
    }
    return {name: section for name, section in every.items() if name in args.section}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a twin was not as the reference is."""
    args = arguments(argv)
    settings = load_settings(args.pair)
    bench = Bench(args.pair, args.twin, args.device, Clock(args.minutes), args.options)
    asked = sections(args)
    twins = bench.check(list(dict.fromkeys(cell for section in asked.values() for cell in section.cells())))
    begin = time.perf_counter()
    engine = bench.open()
    same = {
        "engine": "specserve", "pair": settings.target, "dtype": settings.dtype, "draft": settings.draft,
        "alpha": settings.alpha, "options": args.options, "load_s": round(time.perf_counter() - begin, 1),
        **surroundings(args.device),
    }  # fmt: skip
    rows: list[Row] = []
    try:
        for section in asked.values():
            for row in section.measure(bench, engine, twins):
                rows.append(same | row)
                append(args.results, rows[-1])
                print(json.dumps(row), flush=True)
    finally:
        engine.close()
    for name in asked:
        if own := [row for row in rows if row["section"] == name]:
            print(f"\n{name}\n{TABLES[name](own)}")
    if bench.clock.left_out:
        print(f"\nThere was no time for: {'; '.join(bench.clock.left_out)}.")
    return int(any(row["twin"] is not None and not row["twin"]["passed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
