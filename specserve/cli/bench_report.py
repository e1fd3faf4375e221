"""`specserve bench report FOLDER`: the report of a comparison, made from what it left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from specserve.bench.ab_text import text
from specserve.bench.kept import read_comparison
from specserve.bench.metrics import Slos
from specserve.bench.records import Comparison
from specserve.bench.report.write import write_report
from specserve.cli.bench_flags import add_goodput, slos_of
from specserve.cli.exits import EXIT_REFUSED
from specserve.core.errors import SpecserveError


def add_report(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = actions.add_parser("report", help="make the report of a comparison again, say with other goals")
    parser.add_argument("folder", metavar="FOLDER", help="that `specserve bench ab` wrote")
    parser.add_argument("--output", metavar="FOLDER", help="default: the same")
    add_goodput(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        folder = Path(args.folder)
        show(read_comparison(folder), Path(args.output or folder), slos_of(args))
    except SpecserveError as error:
        print(f"specserve: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def show(comparison: Comparison, folder: Path, slos: Slos | None) -> None:
    """Write the report into a folder and print what it says; raises MissingPackageError."""
    # disable=None: shown on a terminal alone.
    with tqdm(bar_format="{desc}", disable=None, leave=False) as bar:
        report = write_report(comparison, folder, slos, told=lambda title: bar.set_description_str(f"Drawing {title}"))
    print("\n\n".join(text(found) for found in report.found))
    for note in (*comparison.facts.get("notes", []), *([report.missing] if report.missing else [])):
        print(note)
    print(f"\nReport: {report.html}\nData: {folder}")
