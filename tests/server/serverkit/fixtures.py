"""Fixtures for both folders of tests: models on disk, built once a session and worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serverkit.processes import KIT_FOLDER, Server
from serverkit.tiny import make_adapter, make_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and, under `adapters`, `one` and `two`."""
    root = tmp_path_factory.mktemp("tiny")
    model = make_model(root / "model")
    for seed, name in enumerate(("one", "two"), 1):
        make_adapter(root / "adapters" / name, model, seed=seed)
    return root


@pytest.fixture(scope="session")
def scripted_server(tiny: Path) -> Iterator[Server]:
    """A server over the scripted core: base `base`, adapters `one` and `failing`, root `adapters`."""
    server = Server("serverkit.scripted_server", scripted_args(tiny))
    yield server
    server.stop()


def scripted_args(tiny: Path, *more: str) -> list[str]:
    one = tiny / "adapters" / "one"
    return [
        *(str(tiny / "model"), "--port", "0", "--served-model-name", "base"),
        *("--lora", f"one={one}", "--lora", f"failing={one}", "--adapter-root", str(tiny / "adapters")),
        *more,
    ]


@pytest.fixture
def kit_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine processes started from this one find serverkit."""
    monkeypatch.setenv("PYTHONPATH", KIT_FOLDER, prepend=":")
