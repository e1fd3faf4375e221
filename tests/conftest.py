"""What every test shares: quiet, offline, and few threads, since the workers of pytest-xdist divide the cores."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Matrices of tiny models are too small for threads to pay; OMP_NUM_THREADS says otherwise where it is set."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many cases of each law were held. Here, for pytest-xdist reads no deeper conftest where this is shown."""
    passed = [r.nodeid for r in terminalreporter.getreports("passed") if r.when == "call" and "tests/laws/" in r.nodeid]
    for law, count in sorted(Counter(nodeid.split("::")[0] for nodeid in passed).items()):
        terminalreporter.write_line(f"{law}: {count} cases held")
