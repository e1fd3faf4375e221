"""Comparisons of fake engines, which take no time to start and whose pace is known."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from specserve.bench.variants import Variant

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"


@pytest.fixture
def gone() -> Callable[[int], bool]:
    """Whether a process that was killed a moment ago, by whomever, is no more; a zombie is none."""

    def check(pid: int) -> bool:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    return True
            except FileNotFoundError:
                return True
            time.sleep(0.01)
        return False

    return check


@pytest.fixture
def fake() -> Callable[..., Variant]:
    """fake("A", "--token-seconds", "0.01"): a variant that starts a fake engine."""

    def made(name: str, *flags: str) -> Variant:
        command = (sys.executable, str(FAKE_ENGINE), "--port", "{port}", *flags)
        return Variant(name, " ".join(flags) or "as it is", command=command)

    return made
