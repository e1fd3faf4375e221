"""/v1/adapters and vLLM's routes; the folders that loads may come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serverkit.fixtures import scripted_args
from serverkit.processes import Server
from specserve.core.errors import ForbiddenError
from specserve.server.adapters import contained


@pytest.fixture
def two(scripted_server: Server, tiny: Path) -> Iterator[str]:
    """The path of an adapter that may be loaded; whatever was loaded as `two` is gone afterwards."""
    yield str(tiny / "adapters" / "two")
    scripted_server.request("DELETE", "/v1/adapters/two")


def test_life_of_an_adapter(scripted_server: Server, two: str) -> None:
    call = scripted_server.request
    status, info = call("POST", "/v1/adapters", {"name": "two", "path": two, "pinned": True})
    assert status == 201
    assert (info["name"], info["path"], info["pinned"], info["has_draft"]) == ("two", two, True, False)
    assert {"tier", "slot", "rank", "version", "requests", "acceptance"} <= set(info)
    assert call("GET", "/v1/adapters/two") == (200, info)
    assert info in call("GET", "/v1/adapters")[1]["data"]
    assert "two" in [model["id"] for model in call("GET", "/v1/models")[1]["data"]]
    assert call("POST", "/v1/completions", {"model": "two", "prompt": "a", "max_tokens": 1})[0] == 200

    assert call("POST", "/v1/adapters/two/pin", {"pinned": False})[1]["pinned"] is False
    assert call("POST", "/v1/adapters/two/pin")[1]["pinned"] is True
    assert call("POST", "/v1/adapters", {"name": "two", "path": two})[0] == 409
    assert call("PUT", "/v1/adapters/two", {"draft_path": two})[1]["has_draft"] is True
    # What is left out stays as it was.
    reloaded = call("PUT", "/v1/adapters/two")[1]
    assert (reloaded["path"], reloaded["pinned"], reloaded["has_draft"]) == (two, True, True)

    assert call("DELETE", "/v1/adapters/two") == (200, {"name": "two", "object": "adapter", "deleted": True})
    assert call("GET", "/v1/adapters/two")[0] == 404
    assert call("POST", "/v1/completions", {"model": "two", "prompt": "a"})[0] == 404


def test_vllm_routes(scripted_server: Server, two: str) -> None:
    call = scripted_server.request
    body = {"lora_name": "two", "lora_path": two}
    assert call("POST", "/v1/load_lora_adapter", body) == (200, "Success: LoRA adapter 'two' added successfully.")
    assert call("POST", "/v1/load_lora_adapter", body)[0] == 409
    assert call("POST", "/v1/load_lora_adapter", body | {"load_inplace": True})[0] == 200
    assert call("POST", "/v1/unload_lora_adapter", {"lora_name": "two"})[0] == 200
    assert call("GET", "/v1/adapters/two")[0] == 404


def test_vllm_routes_name_their_own_fields(scripted_server: Server, two: str) -> None:
    call = scripted_server.request

    def refused(route: str, **body: str) -> tuple[int, str, str]:
        status, answer = call("POST", f"/v1/{route}_lora_adapter", body)
        return status, answer["error"]["param"], answer["error"]["message"]

    status, param, message = refused("load", lora_name="two", lora_path="/etc")
    assert (status, param, message.split(" lies")[0]) == (403, "lora_path", "lora_path '/etc'")
    status, param, message = refused("load", lora_name="two", lora_path=two + "-missing")  # the engine's own word
    assert (status, param) == (400, "lora_path")
    assert message == f"{two}-missing is no folder."
    assert refused("load", lora_name="a/b", lora_path=two)[:2] == (400, "lora_name")
    call("POST", "/v1/adapters", {"name": "two", "path": two})
    assert refused("load", lora_name="two", lora_path=two)[:2] == (409, "lora_name")


def test_weight_of_an_adapter(scripted_server: Server, two: str) -> None:
    """It comes with a load and stays over reloads that say nothing of it, pins and vLLM's loads among them."""
    call = scripted_server.request
    assert call("GET", "/v1/adapters/one")[1]["weight"] == 1.0
    assert call("POST", "/v1/adapters", {"name": "two", "path": two, "weight": 2.5})[1]["weight"] == 2.5
    assert call("PUT", "/v1/adapters/two")[1]["weight"] == 2.5
    assert call("PUT", "/v1/adapters/two", {"weight": 3})[1]["weight"] == 3.0
    call("POST", "/v1/load_lora_adapter", {"lora_name": "two", "lora_path": two, "load_inplace": True})
    call("POST", "/v1/adapters/two/pin")
    assert call("GET", "/v1/adapters/two")[1]["weight"] == 3.0
    assert {info["name"]: info["weight"] for info in call("GET", "/v1/adapters")[1]["data"]}["two"] == 3.0


@pytest.mark.parametrize("weight", [0, -1, 1000.5, "2", True, [1]])
def test_weight_out_of_range(scripted_server: Server, two: str, weight: object) -> None:
    body = {"name": "two", "path": two, "weight": weight}
    status, answer = scripted_server.request("POST", "/v1/adapters", body)
    assert (status, answer["error"]["param"]) == (400, "weight"), answer
    assert scripted_server.request("PUT", "/v1/adapters/one", {"weight": weight})[0] == 400
    assert scripted_server.request("GET", "/v1/adapters/two")[0] == 404


def test_a_reload_may_unpin(scripted_server: Server, two: str) -> None:
    call = scripted_server.request
    call("POST", "/v1/adapters", {"name": "two", "path": two, "pinned": True})
    body = {"lora_name": "two", "lora_path": two, "load_inplace": True}
    assert call("POST", "/v1/load_lora_adapter", body)[0] == 200
    assert call("GET", "/v1/adapters/two")[1]["pinned"] is True
    assert call("PUT", "/v1/adapters/two", {"pinned": False})[1]["pinned"] is False


def test_folder_of_nothing_is_the_engines_word(scripted_server: Server, two: str) -> None:
    status, answer = scripted_server.request("POST", "/v1/adapters", {"name": "two", "path": two + "-missing"})
    assert status == 400
    assert answer["error"]["code"] == "invalid_adapter"
    assert scripted_server.request("GET", "/v1/adapters/two")[0] == 404


def test_reload_of_a_folder_outside_the_roots_by_its_own_path(tiny: Path) -> None:
    """The operator's --lora may lie anywhere, and is no root; without a root nothing else is loaded over HTTP."""
    server = Server("serverkit.scripted_server", [*scripted_args(tiny)[:-2]])
    try:
        assert server.request("PUT", "/v1/adapters/one")[0] == 200
        body = {"name": "two", "path": str(tiny / "adapters" / "one")}
        status, answer = server.request("POST", "/v1/adapters", body)
        assert status == 403
        assert "--adapter-root" in answer["error"]["message"]
    finally:
        assert server.stop() == 0


def test_containment(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "root-2"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (root / "way-out").symlink_to(outside)
    (outside / "way-in").symlink_to(root / "a")
    (tmp_path / "other-name").symlink_to(root)
    roots = [str(tmp_path / "other-name")]
    assert contained(str(root / "a"), roots, "path") == str(root / "a")
    assert contained(str(outside / "way-in"), roots, "path") == str(root / "a")
    assert contained(str(root / "not" / "there"), roots, "path") == str(root / "not" / "there")
    for path in (outside, root / "way-out", root / "a" / ".." / ".." / "root-2", tmp_path, Path("/"), Path("relative")):
        with pytest.raises(ForbiddenError):
            contained(str(path), roots, "path")


def test_failing_adapter_fails_before_the_stream_begins(scripted_server: Server) -> None:
    with openai.OpenAI(base_url=scripted_server.url + "/v1", api_key="none", max_retries=0) as client:
        fields: dict[str, Any] = {"model": "failing", "prompt": "a", "stream": True}
        with pytest.raises(openai.BadRequestError, match="NaN in lora_A"):
            client.completions.create(**fields)
