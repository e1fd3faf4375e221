"""Where and with what something was measured, and the file that figures are kept in."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from specserve.core.errors import InvalidRequestError


def surroundings() -> dict[str, Any]:
    """Date, command, specserve's version and this machine: what a reader needs to repeat a run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["specserve", *_without_keys(sys.argv[1:])],
        "specserve": _version(),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} × {_processor()}",
    } | _gpus()


def _without_keys(words: Sequence[str]) -> list[str]:
    """Reports are shown around, API keys are not."""
    shown = [re.sub(r"^(--api-key=).*", r"\1…", word) for word in words]
    return ["…" if place and words[place - 1] == "--api-key" else word for place, word in enumerate(shown)]


def check_writable(path: Path, param: str) -> None:
    """Raise InvalidRequestError if lines cannot be added to the file: now, not after minutes of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be written: {error.strerror}.", param=param) from error


def append_line(path: Path, value: Any) -> None:
    """Add one value to a file of JSON lines, whose folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(value) + b"\n")


def _gpus() -> dict[str, str]:
    """{"device": "2 × NAME"}, or nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return {}
    found = Counter(name.strip() for name in names if name.strip())
    return {"device": ", ".join(f"{count} × {name}" for name, count in found.items())} if found else {}


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
