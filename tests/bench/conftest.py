"""A tiny pair with adapters and companions, and its sensitive twin."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest


def _import_benchmarks() -> None:
    """The package without the repository's root on the path, where kernels/ and adapters/ look like other packages."""
    folder = Path(__file__).parents[2] / "benchmarks"
    spec = ModuleSpec("benchmarks", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules.setdefault("benchmarks", importlib.util.module_from_spec(spec))


_import_benchmarks()

from benchmarks.pair import write_pair  # noqa: E402
from benchmarks.shapes import PairSettings  # noqa: E402

SMALL = {"target": "tiny", "draft": "tiny", "adapters": 2, "ranks": (4,), "companions": True, "dtype": "float32"}


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
