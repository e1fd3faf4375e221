"""A tiny target and draft with an adapter, whose random weights disagree enough for a companion to pay."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lawbook.zoo import Zoo, build_zoo
from specserve.distillation.settings import DistillSettings, Job, resolve

TINY: dict[str, Any] = {
    "samples": 24, "max_new_tokens": 12, "steps": 30, "batch_size": 8, "rank": 4, "learning_rate": 0.02,
    "device": "cpu", "temperature": 0.8,
}  # fmt: skip


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return build_zoo("llama", tmp_path_factory.mktemp("distillation_zoo"))


@pytest.fixture
def adapter(zoo: Zoo, tmp_path: Path) -> Path:
    """The zoo's a1, without a companion."""
    folder = Path(shutil.copytree(zoo.adapters["near"]["a1"], tmp_path / "a1"))
    shutil.rmtree(folder / "draft")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Token ids, for these models have no tokenizer."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": [{first}, 7, {first + 1}]}}\n' for first in range(8, 38)))
    return path


@pytest.fixture
def settings(zoo: Zoo, adapter: Path, prompts: Path) -> DistillSettings:
    return DistillSettings(
        name="a1", adapter=str(adapter), prompts=str(prompts), model=str(zoo.target),
        draft_model=str(zoo.drafts["near"]), **TINY,
    )  # fmt: skip


@pytest.fixture
def job(settings: DistillSettings) -> Job:
    return resolve(settings)
