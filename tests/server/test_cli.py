"""Flags are the configs' fields."""

from __future__ import annotations

import msgspec
import pytest

from specserve.cli.flags import ENGINE_HELP, SERVER_HELP
from specserve.cli.main import make_parser
from specserve.cli.serve import configs, describe
from specserve.config import DEMO_ROOT, EngineConfig
from specserve.server.options import ServerConfig

# `model` is the positional argument, `loras` are --lora, `lora_dirs` --lora-dir, and check_integrity is for tests.
NO_FLAGS = {"model", "loras", "lora_dirs", "check_integrity"}


def test_every_field_has_a_flag() -> None:
    assert set(ENGINE_HELP) == {field.name for field in msgspec.structs.fields(EngineConfig)} - NO_FLAGS
    assert set(SERVER_HELP) == {field.name for field in msgspec.structs.fields(ServerConfig)}


def parse(*args: str) -> tuple[EngineConfig, ServerConfig]:
    return configs(make_parser().parse_args(["serve", *args]))


def test_defaults_are_the_configs() -> None:
    engine, server = parse("folder")
    assert engine == EngineConfig(model="folder")
    assert server == ServerConfig(served_model_name=("folder",))


def test_flags_set_fields(tmp_path: object) -> None:
    engine, server = parse(
        *("m", "--draft-model", "d", "--num-draft-tokens", "3", "--lora", "a=/x", "--lora", "b=/y=z"),
        *("--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5", "--dtype", "bfloat16", "--max-waiting", "7"),
        *("--served-model-name", "n1", "--served-model-name", "n2", "--adapter-root", str(tmp_path), "--port", "1"),
    )
    assert engine == EngineConfig(
        model="m",
        draft_model="d",
        num_draft_tokens=3,
        loras=(("a", "/x"), ("b", "/y=z")),
        enable_prefix_caching=False,
        gpu_memory_utilization=0.5,
        dtype="bfloat16",
        max_waiting=7,
    )
    assert server == ServerConfig(served_model_name=("n1", "n2"), adapter_root=(str(tmp_path),), port=1)


def test_auto_drafts() -> None:
    assert parse("m", "--num-draft-tokens", "auto")[0].num_draft_tokens is None


def test_no_model_is_the_demo() -> None:
    engine, server = parse()
    assert engine.model == str(DEMO_ROOT / "target")
    assert engine.draft_model == str(DEMO_ROOT / "draft")
    assert [(name, path) for name, path in engine.loras] == [
        (folder.name, str(folder)) for folder in sorted((DEMO_ROOT / "adapters").glob("*")) if folder.is_dir()
    ]
    assert server.adapter_root == (str(DEMO_ROOT),)
    assert server.served_model_name == ("demo",)


@pytest.mark.parametrize(
    "args",
    [
        ["--lora", "a"],
        ["--num-draft-tokens", "many"],
        ["--dtype", "int4"],
        ["--nonsense"],
        ["--max-num-seqs", "0"],
        ["--block-size", "-1"],
    ],
)
def test_bad_flags_exit_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse("m", *args)
    assert raised.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_the_key_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECSERVE_API_KEY", "secret")
    engine, server = parse("m")
    assert server.api_key == "secret"
    assert "secret" not in describe(engine, server)
    assert parse("m", "--api-key", "given")[1].api_key == "given"
