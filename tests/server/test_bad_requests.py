"""What bad input gets: a 4xx with OpenAI's error body that names the field, and an unharmed server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serverkit.processes import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAY = {"messages": [{"role": "user", "content": "hi"}]}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"} | fields]}


def part(**fields: Any) -> dict[str, Any]:
    return message(content=[fields])


BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"model": "nope"}, 404, "model"),
    ({"lora": "nope"}, 404, "lora"),
    ({"lora": ["one", "nope"]}, 404, "lora"),
    ({"model": "one", "lora": "failing"}, 400, "lora"),
    ({"model": "one", "lora": []}, 400, "lora"),
    ({"model": "one", "lora": ["one", "failing"]}, 400, "lora"),
    ({"lora": ["one", "one"]}, 400, "lora"),
    ({"lora": ["one", "failing", "one", "one", "one"]}, 400, "lora"),
    ({"lora": {"name": "one", "weight": 1}}, 400, "lora.weight"),
    ({"lora": [{"name": "one", "scale": "big"}]}, 400, "lora[0].scale"),
    ({"lora": 5}, 400, "lora"),
    ({"lora": "failing"}, 400, "lora"),
    ({"lora": "failing", "stream": True}, 400, "lora"),
    ({"colour": 1}, 400, "colour"),
    ({"prompt": 5}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": ["a", 5]}, 400, "prompt"),
    ({"prompt": [5, "a"]}, 400, "prompt"),
    ({"prompt": [1.5]}, 400, "prompt[0]"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [300]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [5] * 512}, 400, "prompt"),
    ({"prompt": [5] * 500, "max_tokens": 20}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"min_tokens": 20}, 400, "min_tokens"),
    ({"n": 0}, 400, "n"),
    ({"n": 10**20}, 400, "n"),
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"min_p": 2}, 400, "min_p"),
    ({"seed": 2**63}, 400, "seed"),
    ({"seed": 1.5}, 400, "seed"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    ({"logit_bias": {"300": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"bad_words": "ab"}, 400, "bad_words"),
    ({"bad_words": [""]}, 400, "bad_words"),
    ({"bad_words": ["a", " \n"]}, 400, "bad_words"),
    ({"bad_words": ["a", 5]}, 400, "bad_words[1]"),
    ({"bad_words": ["a"] * 129}, 400, "bad_words"),
    ({"bad_words": ["\u0001" * 33]}, 400, "bad_words"),
    ({"bad_words_token_ids": [[5]]}, 400, "bad_words_token_ids"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": [5]}, 400, "stop[0]"),
    ({"stop_token_ids": [300]}, 400, "stop_token_ids"),
    ({"speculation": {"num_draft_tokens": 65}}, 400, "speculation"),
    ({"speculation": {"proposer": "crystal ball"}}, 400, "speculation"),
    ({"speculation": {"method": "hope"}}, 400, "speculation.method"),
    ({"speculation": {"drafts": 1}}, 400, "speculation.drafts"),
    ({"echo": True}, 400, "echo"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"),
    ({"skip_special_tokens": False}, 400, "skip_special_tokens"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"sausage": True}}, 400, "stream_options.sausage"),
    ({"output_ids": [300]}, 400, "output_ids"),
    ({"output_ids": [5], "n": 2}, 400, "output_ids"),
]

BAD_CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"content": "x"}]}, 400, "messages[0].role"),
    ({"messages": "hi"}, 400, "messages"),
    (message(role="robot"), 400, "messages[0].role"),
    (message(content=None), 400, "messages[0].content"),
    (message(content=5), 400, "messages[0].content"),
    (message(mood="good"), 400, "messages[0].mood"),
    (message(role="tool"), 400, "messages"),
    (message(role="assistant", tool_calls=[{"id": "x"}]), 400, "messages[0].tool_calls"),
    (part(type="image_url", image_url={"url": "x"}), 400, "messages[0].content[0].type"),
    (part(type="text"), 400, "messages[0].content[0].text"),
    (SAY | {"bad_words": [""]}, 400, "bad_words"),
    (SAY | {"tools": [{"type": "function"}]}, 400, "tools"),
    (SAY | {"tool_choice": "required"}, 400, "tool_choice"),
    (SAY | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    (SAY | {"audio": {"voice": "x"}}, 400, "audio"),
    (SAY | {"modalities": ["audio"]}, 400, "modalities"),
    (SAY | {"reasoning_effort": "high"}, 400, "reasoning_effort"),
    (SAY | {"top_logprobs": 2}, 400, "top_logprobs"),
    (SAY | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    (SAY | {"logprobs": 3}, 400, "logprobs"),
    (SAY | {"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
    (SAY | {"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (SAY | {"chat_template_kwargs": {"tokenize": True}}, 400, "chat_template_kwargs.tokenize"),
    (SAY | {"prompt": "x"}, 400, "prompt"),
    (SAY | {"model": "nope"}, 404, "model"),
]

BAD_CALLS: list[tuple[str, str, Any, int, str | None]] = [
    ("POST", "/v1/adapters", {}, 400, "name"),
    ("POST", "/v1/adapters", {"name": "x"}, 400, "path"),
    ("POST", "/v1/adapters", {"name": "x", "path": "/tmp", "size": 1}, 400, "size"),
    ("POST", "/v1/adapters", {"name": "x", "path": "/etc"}, 403, "path"),
    ("POST", "/v1/adapters", {"name": "a/b", "path": "/etc"}, 400, "name"),
    ("POST", "/v1/adapters", {"name": "x" * 129, "path": "/etc"}, 400, "name"),
    ("POST", "/v1/adapters", {"name": "", "path": "/etc"}, 400, "name"),
    ("POST", "/v1/adapters", {"name": "base", "path": "/etc"}, 400, "name"),
    ("POST", "/v1/adapters", {"name": "one", "path": "/etc"}, 409, "name"),
    ("POST", "/v1/adapters", {"name": "x", "path": "a\0b"}, 400, "path"),
    ("GET", "/v1/adapters/nope", None, 404, "name"),
    ("PUT", "/v1/adapters/nope", {}, 404, "name"),
    ("PUT", "/v1/adapters/one", {"path": "/etc"}, 403, "path"),
    ("PUT", "/v1/adapters/one", {"draft_path": "/etc"}, 403, "draft_path"),
    ("DELETE", "/v1/adapters/nope", None, 404, "name"),
    ("POST", "/v1/adapters/nope/pin", {}, 404, "name"),
    ("POST", "/v1/adapters/one/pin", {"pinned": "yes"}, 400, "pinned"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}, 403, "lora_path"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "a/b", "lora_path": "/etc"}, 400, "lora_name"),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "one", "lora_path": "/etc"}, 409, "lora_name"),
    ("POST", "/v1/load_lora_adapter", {"lora_path": "/etc"}, 400, "lora_name"),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}, 404, "lora_name"),
    ("POST", "/tokenize", {}, 400, "prompt"),
    ("POST", "/tokenize", {"prompt": "x", "messages": []}, 400, "prompt"),
    ("POST", "/tokenize", {"prompt": "x", "model": "nope"}, 404, "model"),
    ("POST", "/detokenize", {"tokens": [300]}, 400, "tokens"),
    ("POST", "/detokenize", {"tokens": ["a"]}, 400, "tokens[0]"),
    ("GET", "/v1/models/nope", None, 404, "model"),
    ("GET", "/v1/nothing", None, 404, None),
    ("GET", "/v1/completions", None, 405, None),
    ("POST", "/v1/completions", [], 400, None),
]


def check(server: Server, method: str, path: str, body: Any, status: int, param: str | None) -> None:
    got, answer = server.request(method, path, body)
    assert got == status, answer
    assert set(answer) == {"error"}
    error = answer["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["param"] == param, error
    assert error["message"]
    assert error["type"]
    assert error["code"]


@pytest.mark.parametrize(("fields", "status", "param"), BAD_COMPLETIONS)
def test_completions(scripted_server: Server, fields: dict[str, Any], status: int, param: str | None) -> None:
    check(scripted_server, "POST", COMPLETIONS, {"prompt": "a", "max_tokens": 5} | fields, status, param)


def test_completions_without_prompt(scripted_server: Server) -> None:
    check(scripted_server, "POST", COMPLETIONS, {"model": "base"}, 400, "prompt")


@pytest.mark.parametrize(("body", "status", "param"), BAD_CHATS)
def test_chats(scripted_server: Server, body: dict[str, Any], status: int, param: str | None) -> None:
    check(scripted_server, "POST", CHAT, body, status, param)


@pytest.mark.parametrize(("method", "path", "body", "status", "param"), BAD_CALLS)
def test_calls(scripted_server: Server, method: str, path: str, body: Any, status: int, param: str | None) -> None:
    check(scripted_server, method, path, body, status, param)


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"x" * 10]
)
def test_malformed_json(scripted_server: Server, data: bytes) -> None:
    status, answer = scripted_server.request("POST", COMPLETIONS, data=data)
    assert status == 400
    assert "JSON" in answer["error"]["message"]


@pytest.mark.parametrize("head", [b"", b'{"prompt": "a", "metadata": {"a": '])
def test_nested_to_the_death(scripted_server: Server, head: bytes) -> None:
    status, answer = scripted_server.request("POST", COMPLETIONS, data=head + b"[" * 200_000)
    assert status == 400
    assert answer["error"]["code"]


async def test_oversized_body(scripted_server: Server) -> None:
    """Refused while it is being sent: what comes back is the answer, not the whole of the body."""
    host, port = scripted_server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    size = 65 << 20
    writer.write(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
    try:
        for _ in range(size >> 20):
            writer.write(b" " * (1 << 20))
            await writer.drain()
    except ConnectionError:
        pass
    answer = await reader.read(1 << 16)
    writer.close()
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert b'"payload_too_large"' in answer


HARMLESS: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]},
    {"temperature": None, "stop": None, "seed": None, "lora": None, "tools": None, "logprobs": None},
    {"speculation": False},
    {"speculation": True},
    {"speculation": {"num_draft_tokens": 2, "method": "coupled", "proposer": "ngram"}},
    {"lora": []},
    {"model": "one", "lora": {"name": "one", "scale": 0.5}},
    {"top_k": 10**30},
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_harmless_fields_are_taken(scripted_server: Server, fields: dict[str, Any]) -> None:
    status, answer = scripted_server.request("POST", CHAT, SAY | {"max_tokens": 2} | fields)
    assert status == 200, answer


def test_an_assistants_answer_comes_back_as_a_message(scripted_server: Server) -> None:
    """Clients append what they got, empty fields and all."""
    _, answer = scripted_server.request("POST", CHAT, SAY | {"max_tokens": 2})
    given = answer["choices"][0]["message"] | {
        "tool_calls": None,
        "function_call": None,
        "audio": None,
        "annotations": [],
    }
    messages = [*SAY["messages"], given, {"role": "user", "content": [{"type": "text", "text": "go on"}]}]
    status, answer = scripted_server.request("POST", CHAT, {"messages": messages, "max_tokens": 2})
    assert status == 200, answer


def test_the_server_is_unharmed(scripted_server: Server) -> None:
    assert scripted_server.request("GET", "/ready") == (200, {"ready": True})
    assert scripted_server.request("GET", "/health")[1]["engine_restarts"] == 0
    assert "Traceback" not in scripted_server.log
