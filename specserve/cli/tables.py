"""Adapters as a terminal shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_HEAD = (
    *("NAME", "TIER", "SLOT", "RANK", "SIZE", "WEIGHT", "PINNED", "DRAFT"),
    *("RUNNING", "REQUESTS", "TOKENS", "ACCEPTED", "USED", "VERSION"),
)
SORTS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "name": lambda info: info["name"],
    "requests": lambda info: (-info["requests"], info["name"]),
    "tokens": lambda info: (-info["tokens"], info["name"]),
    "last-use": lambda info: (-(info["last_used"] or 0.0), info["name"]),
    "size": lambda info: (-(info["num_bytes"] or 0), info["name"]),
}


def table(infos: Sequence[dict[str, Any]]) -> str:
    """Adapters in aligned columns, below a head."""
    rows = [_HEAD, *map(_row, infos)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(info: dict[str, Any]) -> tuple[str, ...]:
    # null: its folder has not been read yet
    num_bytes, has_draft, acceptance = info["num_bytes"], info["has_draft"], info["acceptance"]
    return (
        info["name"],
        info["tier"] + (f"/{info['state']}" if info["state"] else ""),
        "-" if info["slot"] is None else str(info["slot"]),
        "-" if info["rank"] is None else str(info["rank"]),
        "-" if num_bytes is None else size(num_bytes),
        f"{info['weight']:g}",
        _yes(info["pinned"]),
        "-" if has_draft is None else _yes(has_draft),
        str(info["running"]),
        str(info["requests"]),
        str(info["tokens"]),
        "-" if acceptance is None else f"{acceptance:.0%}",
        "-" if info["last_used"] is None else age(time.time() - info["last_used"]),
        info["version"][:12] or "-",
    )


def size(num_bytes: float) -> str:
    """Bytes as 512B, 84.1MB, 1.2GB: powers of 1000, without a blank so that a column stays one word."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f}{unit}" if unit == "B" or num_bytes >= 99.95 else f"{num_bytes:.1f}{unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f}GB"


def age(seconds: float) -> str:
    """How long ago: now, 12s, 3min, 5h, 9d."""
    for limit, divisor, unit in ((1, 0, "now"), (60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // divisor:.0f}{unit}" if divisor else unit
    return f"{seconds // 86400:.0f}d"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
