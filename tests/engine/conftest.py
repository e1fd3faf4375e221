"""Tiny random models and adapters on disk, and engines over them that are closed when the test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lawbook.zoo import Zoo, build_zoo
from specserve.llm import LLM

Open = Callable[..., LLM]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return build_zoo("llama", tmp_path_factory.mktemp("engine_zoo"))


@pytest.fixture
def open_llm(zoo: Zoo) -> Iterator[Open]:
    """`open_llm(**config fields, proposers=…)`: an engine in float64 with every adapter and the `near` draft."""
    opened: list[LLM] = []

    def open_llm(**fields: object) -> LLM:
        defaults: dict[str, object] = {
            "model": str(zoo.target),
            "draft_model": str(zoo.drafts["near"]),
            "dtype": "float64",
            "device": "cpu",
            "block_size": 4,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "num_blocks": 4 * 16 + 1,
            "max_loras": 4,
            "max_lora_rank": 16,
            "loras": tuple((name, str(path)) for name, path in zoo.adapters["near"].items()),
            "check_integrity": True,
        }
        opened.append(LLM(**(defaults | fields)))
        return opened[-1]

    yield open_llm
    for llm in opened:
        llm.close()
