"""A tiny pair with adapters and companions, and its sensitive twin."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.pair import write_pair
from benchmarks.shapes import PairSettings

SMALL = {"target": "tiny", "draft": "tiny", "adapters": 2, "rank": 4, "companions": True, "dtype": "float32"}


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, PairSettings(**SMALL), "cpu")  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    write_pair(folder, PairSettings(**SMALL, eps=1.0), "cpu")  # type: ignore[arg-type]
    return folder
