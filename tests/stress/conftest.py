"""What the stress test needs: models, adapter contents, the truth, and engines of all settings."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from lawbook.zoo import Zoo, build_zoo
from stresskit.contents import Library
from stresskit.play import Stage
from stresskit.truth import Judge, Merged, Peft


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return build_zoo("llama", tmp_path_factory.mktemp("stress_zoo"))


@pytest.fixture(scope="session")
def stage(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Where rounds are played: on STRESS_DEVICE."""
    device = os.environ.get("STRESS_DEVICE", "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    root = tmp_path_factory.mktemp("stress")
    library = Library(zoo, root / "library")
    merged = Merged(zoo, library, root)
    yield Stage(zoo, library, Judge(Peft(zoo, library), merged), root, device)
    merged.close()
