"""What vLLM is opened with, as far as that can be told without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import Mode, Setup
from benchmarks.engines.vllm import _settings


def settings(mode: str) -> dict[str, object]:
    return _settings(Setup(Path("pair"), Mode.parse(mode), "cuda", "bfloat16"))


def test_a_draft_model_comes_with_asynchronous_scheduling() -> None:
    """It is on by itself without one: both are measured with it, as the comparisons over HTTP are."""
    plain, drafting = settings("lora8_spec0"), settings("lora8_spec4")
    assert {name: value for name, value in drafting.items() if name not in plain} == {
        "speculative_config": {"method": "draft_model", "model": "pair/draft", "num_speculative_tokens": 4},
        "async_scheduling": True,
    }
    assert plain.items() <= drafting.items()


def test_adapters_are_as_many_as_are_loaded() -> None:
    assert settings("lora8_spec0")["max_loras"] == 8
    assert "enable_lora" not in settings("lora0_spec4")


def test_vllm_chooses_no_number_of_drafts() -> None:
    with pytest.raises(SystemExit, match="use spec4"):
        settings("lora0_specauto")
