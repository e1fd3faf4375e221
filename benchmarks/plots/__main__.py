"""Draws every plot whose rows there are, as SVG.

python -m benchmarks.plots [--results FILE] [--out docs/images]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots.speculation import PLOTS, read
from benchmarks.plots.style import save


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there was nothing to be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/h200-speculation.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args(argv)
    if not args.results.exists():
        print(f"There is no {args.results}: make bench-speculation writes such rows, on a GPU.")
        return 1
    rows, drawn = read(args.results), 0
    for name, (section, draw) in PLOTS.items():
        path, own = args.out / f"{name}.svg", [row for row in rows if row["section"] == section]
        if own:
            save(draw(own), path)
            drawn += 1
        print(f"{path}: {len(own)} rows" if own else f"{path}: not drawn, there are no rows of {section}")
    return int(not drawn)


if __name__ == "__main__":
    raise SystemExit(main())
