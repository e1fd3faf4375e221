"""What adapters cost, and whether anybody notices that they are loaded: one JSON line a row, tables at the end.

    python -m benchmarks.adapters PAIR [--twin TWIN] [--section mixes,ranks,prefill,loading,thousand] [--results FILE]

| Section | What |
|---|---|
| mixes | decode and prefill of the popularity mixes (adapter_mixes.py) by batch size, beside the base model |
| ranks | many adapters, large ranks, mixed ranks, beside the base model and the bytes of their ranks |
| prefill | prefill alone, mixes taking turns |
| loading | others' times between tokens while cold adapters come; time to a first token by tier |
| thousand | a thousand adapters by Zipf's law on few slots, beside all of them resident |

PAIR and TWIN are made by benchmarks/pair.py; of their models only the target is used. Adapters are written beside them
once: 9 GB for an 8B in all, and 3 GB for its twin. With --twin, each batch of the first three sections, and a batch
that must share slots for `thousand`, is first run on the sensitive twin and must be right there (benchmarks/twin.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.adapter_cells import decode_table, measure_mixes, measure_prefill, measure_ranks, prefill_table
from benchmarks.adapter_loading import Arrivals, loading_table, measure_loading
from benchmarks.adapter_setup import Bench
from benchmarks.adapter_thousand import Trace, measure_thousand, thousand_table
from benchmarks.engine import Row
from benchmarks.record import append, surroundings
from benchmarks.shapes import load_settings

TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "mixes": decode_table,
    "ranks": decode_table,
    "prefill": prefill_table,
    "loading": loading_table,
    "thousand": thousand_table,
}


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--twin", type=Path, help="the sensitive twin's folder")
    parser.add_argument("--section", type=names, default=tuple(TABLES), help="one or more, with commas between")
    parser.add_argument("--mixes", type=names, default=names("identical,distinct,uniform,skewed,zipf1.0"))
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 128), help="of mixes and prefill")
    parser.add_argument("--inp", type=int, default=512)
    parser.add_argument("--out", type=int, default=256, help="of mixes and ranks")
    parser.add_argument("--seconds", type=float, default=10.0, help="of loading: how long each run lasts")
    parser.add_argument("--every", type=float, default=0.2, help="of loading: seconds between arrivals")
    parser.add_argument("--streams", type=numbers, default=(8, 32), help="of loading: how many decode meanwhile")
    parser.add_argument("--names", type=int, default=1000, help="of thousand: its adapters")
    parser.add_argument("--requests", type=int, default=1200, help="of thousand")
    parser.add_argument("--concurrent", type=int, default=64, help="of thousand: requests at a time")
    parser.add_argument("--slots", type=int, default=64, help="of thousand")
    parser.add_argument("--answer", type=int, default=128, help="of thousand: tokens of an answer")
    parser.add_argument("--zipf", type=float, default=1.0, help="of thousand: the law's exponent")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/adapters.jsonl"))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the engine's own settings, kept in rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if unknown := set(args.section) - TABLES.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}.")
    return args


def measure(section: str, bench: Bench, args: argparse.Namespace, before: Sequence[Row]) -> list[Row]:
    """One section's rows; `before` are those of the sections before it."""
    match section:
        case "mixes":
            return measure_mixes(bench, args.mixes)
        case "ranks":
            return measure_ranks(bench)
        case "prefill":
            return measure_prefill(bench, [row for row in before if row["section"] == "mixes"])
        case "loading":
            return measure_loading(bench, Arrivals(args.streams, args.seconds, args.every))
        case _:
            trace = Trace(args.names, args.requests, args.concurrent, args.slots, args.zipf, args.inp, args.answer)
            return measure_thousand(bench, trace)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a twin was not as the reference is."""
    args = arguments(argv)
    settings = load_settings(args.pair)
    same = {
        "engine": "specserve", "pair": settings.target, "dtype": settings.dtype, "options": args.options,
        **surroundings(args.device),
    }  # fmt: skip

    def emit(row: Row) -> None:
        append(args.results, same | row)
        print(json.dumps(row), flush=True)

    bench = Bench(args.pair, args.twin, args.device, args.batches, args.inp, args.out, emit, args.options)
    rows: list[Row] = []
    for section in (section for section in TABLES if section in args.section):
        rows += measure(section, bench, args, rows)
    for section, tell in TABLES.items():
        if own := [row for row in rows if row["section"] == section]:
            print(f"\n{section}\n{tell(own)}")
    return int(any(row["twin"] is not None and not row["twin"]["passed"] for row in rows if "twin" in row))


if __name__ == "__main__":
    raise SystemExit(main())
