"""Adapters of a real server and engine: what is refused, what is listed, what is measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from prometheus_client.parser import text_string_to_metric_families
from transformers import LlamaForCausalLM

from serverkit.processes import Server, wait_until
from specserve.cli.main import main

CLI = "specserve.cli.main"


@pytest.fixture(scope="module")
def root(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An --adapter-root with a folder of adapters in it."""
    root = tmp_path_factory.mktemp("root")
    for name in ("a", "b", "c"):
        shutil.copytree(tiny / "adapters" / "one", root / "served" / name)
    shutil.copytree(tiny / "adapters" / "two", root / "later")
    return root


@pytest.fixture(scope="module")
def server(tiny: Path, root: Path) -> Iterator[Server]:
    server = Server(
        CLI,
        [
            *("serve", str(tiny / "model"), "--served-model-name", "base", "--port", "0"),
            *("--kv-cache-bytes", str(1 << 24), "--max-loras", "2", "--max-host-lora-bytes", str(1 << 20)),
            *("--lora-dir", str(root / "served"), "--adapter-root", str(root)),
        ],
    )
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


def listed(server: Server) -> dict[str, dict[str, Any]]:
    return {info["name"]: info for info in server.request("GET", "/v1/adapters")[1]["data"]}


def complete(server: Server, model: str) -> None:
    status, answer = server.request("POST", "/v1/completions", {"model": model, "prompt": "a b", "max_tokens": 4})
    assert status == 200, answer


def samples(server: Server) -> dict[tuple[str, ...], float]:
    """(name, label values) of specserve's own metrics → value."""
    families = text_string_to_metric_families(server.request("GET", "/metrics")[1])
    found = (sample for family in families for sample in family.samples if sample.name.startswith("specserve:"))
    return {(sample.name, *sample.labels.values()): sample.value for sample in found}


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "embeddings",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {},
        "Tensor base_model.model.model.embed_tokens.base_layer.weight: LoRA on embeddings and on lm_head is not "
        "supported; train it without them in target_modules.",
    ),
    (
        "lm-head",
        {"target_modules": ["q_proj", "lm_head"]},
        {},
        "Tensor base_model.model.lm_head.base_layer.weight: LoRA on embeddings and on lm_head is not supported; "
        "train it without them in target_modules.",
    ),
    (
        "lm-head-alone",
        {"target_modules": ["q_proj", "lm_head"]},
        {"save_embedding_layers": False},
        "Tensor base_model.model.lm_head.lora_A.weight: LoRA on embeddings and on lm_head is not supported; train it "
        "without them in target_modules.",
    ),
    (
        "embeddings-alone",
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"save_embedding_layers": False},
        "Tensor base_model.model.model.embed_tokens.lora_embedding_A: LoRA on embeddings and on lm_head is not "
        "supported; train it without them in target_modules.",
    ),
    (
        "whole-embeddings",
        {"target_modules": ["q_proj"]},
        {"save_embedding_layers": True},
        "Tensor base_model.model.lm_head.weight: whole embeddings are no LoRA; if they were not trained, save the "
        "adapter with save_embedding_layers=False.",
    ),
    (
        "trained-head",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {},
        "adapter_config.json: modules_to_save=['lm_head']: fully trained modules are not supported.",
    ),
]


@pytest.mark.parametrize(("name", "config", "save", "said"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_no_plain_lora_is_refused_by_name(
    server: Server, tiny: Path, root: Path, name: str, config: dict[str, Any], save: dict[str, Any], said: str
) -> None:
    """As peft itself saves them: the answer names adapter and tensor or setting, and what to do."""
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(tiny / "model"), LoraConfig(r=4, **config))
    adapted.save_pretrained(root / name, **save)
    status, answer = server.request("POST", "/v1/adapters", {"name": name, "path": str(root / name)})
    assert status == 400
    assert answer["error"] == {
        "message": f"Adapter {name!r}: {said}",
        "type": "invalid_request_error",
        "param": "path",
        "code": "invalid_adapter",
    }
    assert name not in listed(server)


def test_a_folder_of_adapters_is_there_and_unread_at_start(server: Server) -> None:
    infos = listed(server)
    assert {"a", "b", "c"} <= infos.keys()
    for unread in (infos["c"], server.request("GET", "/v1/adapters/c")[1]):
        assert (unread["version"], unread["rank"], unread["num_bytes"], unread["has_draft"]) == ("", None, None, None)
    complete(server, "c")
    info = server.request("GET", "/v1/adapters/c")[1]
    assert (info["tier"], info["state"], info["rank"], info["requests"], info["running"]) == ("device", None, 4, 1, 0)
    assert info["num_bytes"] > 0
    assert info["has_draft"] is False
    assert info["last_used"] > 1e9


def test_weight_is_the_engines(server: Server, root: Path) -> None:
    body = {"name": "heavy", "path": str(root / "later"), "weight": 3}
    assert server.request("POST", "/v1/adapters", body)[1]["weight"] == 3.0
    assert server.request("PUT", "/v1/adapters/heavy", {"weight": 4})[1]["weight"] == 4.0
    assert server.request("PUT", "/v1/adapters/heavy")[1]["weight"] == 4.0
    assert listed(server)["heavy"]["weight"] == 4.0
    server.request("DELETE", "/v1/adapters/heavy")


def test_metrics_follow_loads_and_unloads(server: Server, root: Path) -> None:
    """Every adapter has its series, told once or often; one that is unloaded loses them and gives its memory back."""
    complete(server, "a")
    wait_until(lambda: samples(server).get(("specserve:adapter_requests_total", "a"), 0) > 0, "a is told of")
    before = samples(server)
    assert ("specserve:adapter_tier", "b") in before
    status, info = server.request("POST", "/v1/adapters", {"name": "later", "path": str(root / "later")})
    assert status == 201
    complete(server, "later")
    wait_until(lambda: samples(server).get(("specserve:adapter_tokens_total", "later"), 0) == 4, "later is told of")
    held = samples(server)
    assert held["specserve:lora_host_bytes",] == before["specserve:lora_host_bytes",] + info["num_bytes"]
    assert held["specserve:lora_host_bytes_max",] == 1 << 20
    assert held["specserve:lora_slots",] == 2
    assert 0 < held["specserve:lora_slots_used",] <= 2
    assert held["specserve:lora_reads_total",] > before["specserve:lora_reads_total",]
    assert held["specserve:lora_loads_total",] > before["specserve:lora_loads_total",]
    assert held["specserve:lora_read_seconds_total",] > 0

    server.request("DELETE", "/v1/adapters/later")
    wait_until(lambda: ("specserve:adapter_tier", "later") not in samples(server), "its series are gone")
    after = samples(server)
    assert not any("later" in key for key in after)
    assert after["specserve:lora_slots_used",] == held["specserve:lora_slots_used",] - 1
    assert after["specserve:lora_host_bytes",] == before["specserve:lora_host_bytes",]


def test_the_command_line_and_a_broken_folder(server: Server, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = root / "broken"
    shutil.copytree(root / "later", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 100)
    pairs = [f"broken={broken}", f"sound={root / 'later'}"]
    assert main(["adapters", "load", *pairs, "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert "sound" in out
    assert "specserve: Adapter 'broken': adapter_model.safetensors cannot be read" in err
    assert err.endswith("1 of 2 adapters failed.\n")
    assert main(["adapters", "unload", "sound", "--url", server.url]) == 0
