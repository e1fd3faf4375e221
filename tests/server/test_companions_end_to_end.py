"""Draft companions over HTTP: loaded with their adapters, shown in the list, replaced, refused with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from serverkit.processes import Server
from specserve.cli.main import main


@pytest.fixture(scope="module")
def root(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter `one`, with itself as its companion: the server's target is its own draft."""
    root = tmp_path_factory.mktemp("companions")
    for folder in (root / "one", root / "one" / "draft", root / "bare"):
        shutil.copytree(tiny / "adapters" / "one", folder)
    return root


@pytest.fixture(scope="module")
def server(tiny: Path, root: Path) -> Iterator[Server]:
    server = Server(
        "specserve.cli.main",
        [
            *("serve", str(tiny / "model"), "--draft-model", str(tiny / "model"), "--served-model-name", "base"),
            *("--port", "0", "--kv-cache-bytes", str(1 << 24), "--max-lora-rank", "8"),
            *("--lora", f"bare={root / 'bare'}", "--adapter-root", str(root)),
        ],
    )
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


def listed(server: Server, name: str) -> dict[str, Any]:
    status, info = server.request("GET", f"/v1/adapters/{name}")
    assert status == 200
    found: dict[str, Any] = info
    return found


def complete(server: Server, name: str) -> dict[str, int]:
    """What a request was told of its drafts."""
    body = {
        "model": name, "prompt": "a b", "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        "speculation": {"num_draft_tokens": 3},
    }  # fmt: skip
    status, answer = server.request("POST", "/v1/completions", body)
    assert status == 200, answer
    stats: dict[str, int] = answer["usage"]["speculation"]
    return stats


def test_life_of_a_companion(server: Server, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert server.request("POST", "/v1/adapters", {"name": "one", "path": str(root / "one")})[0] == 201
    first = listed(server, "one")
    assert (first["has_draft"], first["acceptance"]) == (True, None)
    stats = {name: complete(server, name) for name in ("one", "bare")}
    for name, own in stats.items():
        assert listed(server, name)["acceptance"] == own["accepted"] / own["drafted"]
    assert listed(server, "one")["acceptance"] > max(0.9, listed(server, "bare")["acceptance"])
    assert listed(server, "bare")["has_draft"] is False

    shutil.rmtree(root / "one" / "draft")
    assert main(["adapters", "reload", "one", "--url", server.url]) == 0
    capsys.readouterr()
    second = listed(server, "one")
    assert second["has_draft"] is False
    assert second["version"] != first["version"]


def test_a_companion_of_too_large_a_rank(server: Server, tiny: Path, root: Path) -> None:
    folder = Path(shutil.copytree(root / "bare", root / "large"))
    model = LlamaForCausalLM.from_pretrained(tiny / "model")
    get_peft_model(model, LoraConfig(r=9, target_modules=["q_proj"])).save_pretrained(folder / "draft")
    status, answer = server.request("POST", "/v1/adapters", {"name": "large", "path": str(folder)})
    assert status == 400
    message = answer["error"]["message"]
    assert message.startswith("Adapter 'large': draft companion: ")
    assert "--max-lora-rank 9" in message
    assert "specserve adapters distill large" in message
