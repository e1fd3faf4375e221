"""The comparisons over HTTP: files that `specserve bench ab` takes, flags that servers take, like settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from specserve.bench.variants import Variant, read_variants
from specserve.cli.main import make_parser
from specserve.cli.serve import configs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = {"adapters": ["vllm", "specserve"], "draft": ["vllm", "specserve"], "modes": ["none", "four", "auto"]}
PLAIN = {("adapters", "specserve"), ("modes", "none")}  # without a draft model
SHARED = ("--max-model-len", "--max-num-seqs", "--max-loras", "--max-lora-rank")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a `vllm` on the PATH and a pair's adapters, as far as names go."""
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for number in range(8):
        folder = tmp_path / f"build/pairs/pair/lora/a{number}"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).touch()
    monkeypatch.chdir(tmp_path)


def _read(name: str) -> list[Variant]:
    return read_variants(str(BENCHMARKS / f"http_{name}.yaml"), "demo")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("here")
def test_every_side_is_known_and_serves_the_pair(name: str) -> None:
    found = _read(name)
    assert [one.name for one in found] == NAMES[name]
    assert {one.tokenizer for one in found} == {"build/pairs/pair/target"}
    for one in found:
        assert one.engine == ("vllm" if one.name == "vllm" else "specserve")
        assert "--no-enable-prefix-caching" in one.command
        assert "--gpu-memory-utilization" not in one.command  # shared out by the comparison
    for flag in SHARED:
        assert len({one.command[one.command.index(flag) + 1] for one in found}) == 1, flag


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("here")
def test_servers_take_their_flags_and_have_the_same_adapters(name: str) -> None:
    adapters = {f"a{number}": f"build/pairs/pair/lora/a{number}" for number in range(8)}
    for one in _read(name):
        if one.engine == "vllm":
            assert dict(word.split("=") for word in one.command if word.startswith("a")) == adapters
            continue
        engine, _ = configs(make_parser("serve").parse_args(list(one.command[1:])))
        assert dict(engine.loras) == adapters
        assert engine.draft_model == (None if (name, one.name) in PLAIN else "build/pairs/pair/draft")
        assert engine.num_draft_tokens == (4 if one.name == "four" else None)


@pytest.mark.usefixtures("here")
def test_vllm_drafts_four_and_schedules_asynchronously() -> None:
    (vllm, _), (without, _) = _read("draft"), _read("adapters")
    assert '"num_speculative_tokens": 4' in vllm.command[vllm.command.index("--speculative-config") + 1]
    added = [word for word in vllm.command if word not in without.command and word.startswith("--")]
    assert added == ["--speculative-config", "--async-scheduling"]


def test_the_bundled_models_are_compared_without_and_with_drafts() -> None:
    plain, draft = read_variants(str(BENCHMARKS / "ab_cpu.yaml"), "demo")
    assert {plain.tokenizer, draft.tokenizer} == {"demo"}
    assert draft.command[: len(plain.command)] == plain.command
    assert draft.command[-2:-1] == ("--draft-model",)
