"""--lora-dir: every subfolder is an adapter, registered by a look."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from serverkit.processes import DEADLINE, Server, kit_environment
from specserve.cli.main import make_parser
from specserve.cli.serve import configs, describe
from specserve.config import ADAPTER_FILES, DEMO_ROOT, EngineConfig, adapters_in, resolve_paths
from specserve.core.errors import InvalidRequestError


def make_folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for file in ADAPTER_FILES:
            (root / name / file).write_bytes(b"{}")
    return root


def test_every_subfolder_is_an_adapter(tmp_path: Path) -> None:
    first = make_folder(tmp_path / "first", "b", "a", ".hidden")
    second = make_folder(tmp_path / "second", "c")
    (first / "README.md").write_text("no adapter")
    (second / "link").symlink_to(first / "a")
    args = ["serve", "m", "--lora", "own=/x", "--lora-dir", str(first), "--lora-dir", str(second)]
    engine, _ = configs(make_parser().parse_args(args))
    assert engine.loras == (
        ("own", "/x"), ("a", str(first / "a")), ("b", str(first / "b")), ("c", str(second / "c")),
        ("link", str(second / "link")),
    )  # fmt: skip
    assert engine.lora_dirs == ()
    assert resolve_paths(engine) == engine


def test_the_demo_with_adapters_of_ones_own(tmp_path: Path) -> None:
    engine = resolve_paths(EngineConfig(lora_dirs=(str(make_folder(tmp_path, "a")),)))
    assert engine.model == str(DEMO_ROOT / "target")
    assert engine.loras == (("a", str(tmp_path / "a")),)


def test_an_empty_folder_is_none_yet(tmp_path: Path) -> None:
    assert resolve_paths(EngineConfig(model="m", lora_dirs=(str(tmp_path),))).loras == ()


def test_refused_by_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root", "a", "d")
    for name in ("e1", "e2", "e3", "e4", "e5", "e6"):
        (root / name).mkdir()
    make_folder(root, "half")
    (root / "half" / ADAPTER_FILES[1]).unlink()
    with pytest.raises(InvalidRequestError, match=r"these do not: e1, e2, e3, e4, e5 and 2 more\.") as raised:
        adapters_in(str(root))
    assert raised.value.param == "lora_dirs"
    with pytest.raises(InvalidRequestError, match="cannot be listed: No such file"):
        adapters_in(str(root / "nothing"))
    with pytest.raises(InvalidRequestError, match="is itself an adapter"):
        adapters_in(str(root / "a"))
    other = make_folder(tmp_path / "other", "x")
    with pytest.raises(InvalidRequestError, match="--lora-dir names the adapter 'x' twice: /x and "):
        resolve_paths(EngineConfig(model="m", loras=(("x", "/x"),), lora_dirs=(str(other),)))
    make_folder(other, "not a name")
    with pytest.raises(InvalidRequestError, match="'not a name' must be 1 to 128 of the characters"):
        configs(make_parser().parse_args(["serve", "m", "--lora-dir", str(other)]))


def test_a_thousand_take_no_time(tmp_path: Path) -> None:
    make_folder(tmp_path, *(f"adapter-{number:04}" for number in range(1000)))
    start = time.perf_counter()
    engine, server = configs(make_parser().parse_args(["serve", "m", "--lora-dir", str(tmp_path)]))
    assert time.perf_counter() - start < 2.0  # some 10 ms, on a machine with nothing else to do
    assert len(engine.loras) == 1000
    assert len(describe(engine, server)) < 5000


def test_a_server_with_a_folder(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tiny / "adapters" / name)
    args = [str(tiny / "model"), "--port", "0", "--lora-dir", str(tmp_path)]
    server = Server("serverkit.scripted_server", args)
    try:
        assert {"one", "two"} <= {model["id"] for model in server.request("GET", "/v1/models")[1]["data"]}
        assert server.request("POST", "/v1/completions", {"model": "two", "prompt": "a", "max_tokens": 1})[0] == 200
    finally:
        assert server.stop() == 0


def test_a_bad_folder_is_one_sentence_at_start(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "no-adapter").mkdir()
    command = [*("specserve.cli.main", "serve", str(tiny / "model"), "--port", "0"), "--lora-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=kit_environment(), timeout=DEADLINE,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("specserve: Every subfolder of ")
    assert done.stderr.count("\n") == 1
