"""Draws every plot whose rows there are, as SVG.

python -m benchmarks.plots [--results FILE] [--out docs/images]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import adapters, speculation
from benchmarks.plots.style import save

RESULTS = Path("benchmarks/results")
SOURCES = ((speculation, RESULTS / "h200-speculation.jsonl"), (adapters, RESULTS / "h200-adapters.jsonl"))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there was nothing to be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="rows of either benchmark [those that are kept]")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    drawn = 0
    for source, kept in SOURCES:
        results = args.results or kept
        if not results.exists():
            print(f"There is no {results}: make bench-speculation and make bench-adapters write such rows, on a GPU.")
            continue
        rows = source.read(results)
        for name, (sections, draw) in source.PLOTS.items():
            path, own = args.out / f"{name}.svg", [row for row in rows if row["section"] in sections]
            if own:
                save(draw(own), path)
                drawn += 1
            told = f"{len(own)} rows" if own else f"not drawn, there are no rows of {' or '.join(sections)}"
            print(f"{path}: {told}")
    return int(not drawn)


if __name__ == "__main__":
    raise SystemExit(main())
