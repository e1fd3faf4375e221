"""What a result's row says about where it was measured, and how rows are kept: JSON lines, only ever added to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).parent


def commit() -> str:
    """The repository's commit, with "-dirty" where files differ from it; "" outside of a repository. The variable
    COMMIT names it where the files are a copy without their history."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    return _output(git)


def machine() -> str:
    """The processor's name and how many of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {names[0] if names else platform.processor() or platform.machine()}"


def surroundings(device: str) -> dict[str, object]:
    """Commit, date, versions, driver and device of this run."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__, "triton": _version("triton"), "cuda": torch.version.cuda,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"])
        if on_gpu
        else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else machine(),
    }  # fmt: skip


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add one row to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
