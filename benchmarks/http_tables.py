"""Prints the tables of README and of docs/performance.md from the comparisons over HTTP that are kept.

python -m benchmarks.http_tables [ADAPTERS DRAFT]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.http_rows import FOLDERS, Figures, Row, read, read_alone
from specserve.bench.words import metric_name
from specserve.core.errors import InvalidRequestError

SHORT = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
FULL = (
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "mean_e2el_ms",
    "output_throughput",
)  # fmt: skip


def short(kept: Sequence[Figures]) -> Iterator[str]:
    """README's: a row for each rate, in ms, A / B."""
    yield from _head(["requests/s", *_short_heads(kept)])
    for rate in kept[0].rates:
        cells = [f"{value(row['of_a'])} / {value(row['of_b'])}" for row in _rows(kept, rate, SHORT)]
        yield _line([f"{rate:g}", *cells])


def full(kept: Sequence[Figures]) -> Iterator[str]:
    """A row for each rate and metric: A, B and how many times as good B is."""
    yield from _head(["requests/s", "", *(head for one in kept for head in (*one.titles, f"×, {one.what}"))])
    for rate in kept[0].rates:
        for place, metric in enumerate(FULL):
            cells = [cell for row in _rows(kept, rate, (metric,)) for cell in _told(row)]
            yield _line(["" if place else f"{rate:g}", _named(metric), *cells])


def against_better(kept: Sequence[Figures], alone: Mapping[tuple[str, float], Row]) -> Iterator[str]:
    """A row for each rate: A's figure alone, and how many times as good B is as the better of A's two."""
    yield from _head(["requests/s", *_short_heads(kept)])
    for rate in kept[0].rates:
        cells = [
            _better(one.ratios[rate, metric], alone.get((one.what, rate), {}).get(metric))
            for one in kept for metric in SHORT
        ]  # fmt: skip
        yield _line([f"{rate:g}", *cells])


def value(figure: float) -> str:
    """With three digits, or all of its whole ones."""
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def speedup(row: Row) -> str:
    bounds = f" ({row['low']:.2f}–{row['high']:.2f})" if row["low"] is not None else ""
    return f"{row['speedup']:.2f}{bounds}"


def _short_heads(kept: Sequence[Figures]) -> list[str]:
    names = [metric_name(metric) for metric in SHORT]
    return [name for one in kept for name in (f"{one.what}: {names[0]}", *names[1:])]


def _told(row: Row) -> tuple[str, str, str]:
    return value(row["of_a"]), value(row["of_b"]), speedup(row)


def _better(row: Row, alone: float | None) -> str:
    if alone is None:
        return f"–, {row['speedup']:.2f}×"
    return f"{alone:g}, {min(alone, row['of_a']) / row['of_b']:.2f}×"


def _rows(kept: Sequence[Figures], rate: float, metrics: Iterable[str]) -> list[Row]:
    return [one.ratios[rate, metric] for one in kept for metric in metrics]


def _named(metric: str) -> str:
    return metric_name(metric) + (", ms" if metric.endswith("_ms") else "")


def _head(names: Sequence[str]) -> Iterator[str]:
    yield _line(names)
    yield "|" + "---|" * len(names)


def _line(cells: Iterable[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there are no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", default=FOLDERS)
    args = parser.parse_args(argv)
    try:
        kept = [read(folder) for folder in args.folders]
    except InvalidRequestError as error:
        print(error)
        return 1
    print(*short(kept), "", *full(kept), "", *against_better(kept, read_alone()), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
