"""Write a report: report.html, report.jsonl, and each picture as NAME.png and NAME-dark.png."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from specserve.bench.compare import Compared, comparisons
from specserve.bench.extra import MissingPackageError, needed
from specserve.bench.metrics import Slos
from specserve.bench.records import Comparison
from specserve.bench.report.page import Figure, page
from specserve.bench.report.rows import rows
from specserve.core.errors import InvalidRequestError


class Report(msgspec.Struct, frozen=True):
    """What was found out, and where it is written."""

    found: list[Compared]  # every other variant beside the first
    html: Path
    jsonl: Path
    pictures: list[Path]
    missing: str | None = None  # what to install for pictures; None: they are there


def write_report(
    comparison: Comparison,
    folder: Path,
    slos: Slos | None = None,
    confidence: float = 0.95,
    told: Callable[[str], None] = lambda picture: None,
) -> Report:
    """Of whatever there is: runs cut short, one side alone, none. `told` hears of each picture before it is drawn.

    Without matplotlib the report has no pictures and says why. Raises MissingPackageError without scipy, and
    InvalidRequestError for a folder that cannot be made.
    """
    found = comparisons(comparison, slos, confidence)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"{folder} cannot be made: {error.strerror}.", param="output") from error
    html, jsonl = folder / "report.html", folder / "report.jsonl"
    jsonl.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows(comparison, found, slos)))
    figures: list[Figure] = []
    pictures: list[Path] = []
    missing = None
    try:
        needed("matplotlib", "Drawing pictures")
        figures, pictures = _draw(comparison, found, folder, told)
    except MissingPackageError as error:
        missing = error.message
    html.write_text(page(comparison, found, figures, missing or ""), encoding="utf-8")
    return Report(found, html, jsonl, pictures, missing)


def _draw(
    comparison: Comparison, found: Sequence[Compared], folder: Path, told: Callable[[str], None]
) -> tuple[list[Figure], list[Path]]:
    from specserve.bench.report.pictures import pictures_of  # noqa: PLC0415 (needs matplotlib)
    from specserve.bench.report.theme import inline_svg, save_pngs  # noqa: PLC0415

    figures, paths = [], []
    for picture in pictures_of(comparison, found):
        told(picture.title)
        paths += save_pngs(picture, folder, picture.name)
        narrow = inline_svg(picture, narrow=True) if picture.wide else None
        figures.append(Figure(inline_svg(picture), picture.caption, narrow))
    return figures, paths
