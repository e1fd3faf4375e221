"""Where and with what something was measured, and the file that figures are kept in."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec


def surroundings() -> dict[str, Any]:
    """Date, command, specserve's version and this machine: what a reader needs to repeat a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["specserve", *sys.argv[1:]],
        "specserve": _version(),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {_processor()}",
    }


def append_line(path: Path, value: Any) -> None:
    """Add one value to a file of JSON lines, whose folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(value) + b"\n")


def _version() -> str:
    try:
        return version("specserve")
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
