"""Keep a comparison among the results: what `specserve bench ab` left, without the places of the machine it ran on.

    python -m benchmarks.ab_results FOLDER benchmarks/results/NAME            runs.jsonl, about.json, report.jsonl
    python -m benchmarks.ab_results FOLDER benchmarks/results/NAME --figures  without the runs, where they are large

Paths are told from the repository's root, others by their last part. Times of events are kept to a
hundredth of a millisecond.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.record import commit
from specserve.bench.compare import comparisons
from specserve.bench.kept import ABOUT, RUNS, read_comparison
from specserve.bench.records import Comparison, Event, RequestRecord, RunRecord, VariantInfo
from specserve.bench.report.rows import rows

ROOT = Path(__file__).parent.parent
DIGITS = 5  # of times in seconds
_FOLDERS = re.compile(r"(?<![\w:/.~-])/(?:[^/\s'\")]+/)+")  # of an absolute path, not of a URL
ENCODER = msgspec.json.Encoder()


def without_places(value: Any, root: Path = ROOT) -> Any:
    """The same with every path in its texts as it would be typed in the repository, others by their last part."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value.replace(f"{root}/", ""))
    if isinstance(value, list):
        return [without_places(one, root) for one in value]
    return {name: without_places(one, root) for name, one in value.items()} if isinstance(value, dict) else value


def cleaned(comparison: Comparison) -> Comparison:
    """The same figures; the facts say at which commit."""
    variants = [
        msgspec.convert(without_places(msgspec.to_builtins(one)) | {"url": None}, VariantInfo)
        for one in comparison.variants
    ]
    facts = without_places(comparison.facts) | {"commit": commit()}
    return Comparison(variants, [_rounded(run) for run in comparison.runs], facts)


def _rounded(run: RunRecord) -> RunRecord:
    requests = [_rounded_request(request) for request in run.requests]
    return msgspec.structs.replace(run, duration=round(run.duration, DIGITS), requests=requests)


def _rounded_request(one: RequestRecord) -> RequestRecord:
    events = [Event(round(event.time, DIGITS), event.tokens) for event in one.events]
    return msgspec.structs.replace(one, sent=round(one.sent, DIGITS), end=round(one.end, DIGITS), events=events)


def keep(folder: Path, out: Path, *, figures: bool) -> list[Path]:
    """Write it; returns the files."""
    comparison = cleaned(read_comparison(folder))
    about = msgspec.structs.replace(comparison, runs=[])
    contents = {
        ABOUT: msgspec.json.format(ENCODER.encode(about)) + b"\n",
        "report.jsonl": ENCODER.encode_lines(rows(comparison, comparisons(comparison))),
    }
    if not figures:
        contents[RUNS] = ENCODER.encode_lines(comparison.runs)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (out / name).write_bytes(content)
    return [out / name for name in contents]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figures", action="store_true", help="leave the runs out")
    args = parser.parse_args()
    for path in keep(args.folder, args.out, figures=args.figures):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
