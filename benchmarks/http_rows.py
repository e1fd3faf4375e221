"""Comparisons over HTTP as benchmarks/ab_results.py keeps them: their figures by load and metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specserve.bench.lines import read_lines
from specserve.core.errors import InvalidRequestError

Row = dict[str, Any]

ALONE = Path("benchmarks/results/h200-vllm-alone.jsonl")
FOLDERS = tuple(Path("benchmarks/results") / name for name in ("ab-h200-adapters", "ab-h200-draft"))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of two servers at several rates."""

    what: str  # is served: "8 adapters, a draft model"
    titles: tuple[str, str]
    device: str
    rates: tuple[float, ...]
    ratios: dict[tuple[float, str], Row]  # by rate and metric: both sides' figures, the speedup and its bounds


def read(folder: Path) -> Figures:
    """Raises InvalidRequestError where there are none."""
    rows = [row for _, row in read_lines(folder / "report.jsonl", dict[str, Any], "folder")]
    found = {(row["load"].get("rate"), row["metric"]): row for row in rows if row["kind"] == "ratio"}
    facts = next((row for row in rows if row["kind"] == "facts"), None)
    if facts is None or not found or None in {rate for rate, _ in found}:
        raise InvalidRequestError(f"{folder} compares nothing by requests a second.")
    first, second = facts["variants"]
    adapters = f"{len(facts['facts']['requests'].get('lora_modules', ()))} adapters"
    drafts = ", a draft model" if "--draft-model" in second["command"] else ""
    return Figures(
        adapters + drafts,
        # Titles may say more, which `what` says for both.
        (first["title"].split(",")[0], second["title"].split(",")[0]),
        facts["facts"]["device"].split("NVIDIA ")[-1],
        tuple(sorted({rate for rate, _ in found})),
        found,
    )


def read_alone(path: Path = ALONE) -> dict[tuple[str, float], Row]:
    """The first server's figures on another day, when it had a GPU alone, by what was served and the rate."""
    return {(row["what"], row["rate"]): row for _, row in read_lines(path, dict[str, Any], "path")}
