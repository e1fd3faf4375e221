"""Draws the documentation's pictures of a comparison that is kept with its runs, each for light and for dark pages.

python -m benchmarks.ab_pictures [FOLDER] [--out docs/images]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from specserve.bench.ab_text import text
from specserve.bench.compare import comparisons
from specserve.bench.kept import read_comparison
from specserve.bench.report.pictures import pictures_of
from specserve.bench.report.theme import save_pngs
from specserve.core.errors import InvalidRequestError

FOLDER, OUT = Path("benchmarks/results/ab-cpu"), Path("docs/images")
SHOWN = ("speedup", "alpha")  # pictures by the first word of their names


def draw(folder: Path, out: Path) -> list[Path]:
    """ab-speedup.png, ab-alpha.png, and both with -dark; of several comparisons the first one's."""
    comparison = read_comparison(folder)
    found = comparisons(comparison)
    pictures = {picture.name.split("-")[0]: picture for picture in reversed(pictures_of(comparison, found))}
    missing = [name for name in SHOWN if name not in pictures]
    if missing:
        raise InvalidRequestError(f"{folder} has no runs for: {', '.join(missing)}.")
    print(text(found[0]))  # what docs/benchmarking.md says beside them
    out.mkdir(parents=True, exist_ok=True)
    return [path for name in SHOWN for path in save_pngs(pictures[name], out, f"ab-{name}")]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there is nothing to draw from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    try:
        paths = draw(args.folder, args.out)
    except InvalidRequestError as error:
        print(f"{error} `specserve bench ab` and `python -m benchmarks.ab_results` write such a folder.")
        return 1
    print("", *paths, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
