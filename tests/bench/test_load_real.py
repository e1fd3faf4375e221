"""The client against specserve's own server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serverkit.fixtures import scripted_server, tiny
from serverkit.processes import Server
from specserve.bench.client import connect
from specserve.bench.load import run_load
from specserve.bench.records import RunRecord, TracedRequest
from specserve.bench.target import CHAT, COMPLETIONS, Target, ask_version, look

__all__ = ["scripted_server", "tiny"]


def run(server: Server, requests: list[TracedRequest], **more: Any) -> RunRecord:
    async def go() -> RunRecord:
        found = await look(server.url, {})
        assert (found.engine, found.model, found.adapters) == ("specserve", "base", ["one", "failing"])
        async with connect(Target(url=server.url, engine=found.engine, model=found.model, **more)) as client:
            return await run_load(client, requests)

    return asyncio.run(go())


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("token_counts", [True, False])
def test_records_agree_with_an_answer_that_is_not_streamed(
    scripted_server: Server, endpoint: str, token_counts: bool
) -> None:
    greedy = {"temperature": 0.0}
    asked = [
        TracedRequest(place, 0.0, f"prompt {place}", 0, 5 + place, "one" if place else None, greedy | {"n": 1 + place})
        for place in range(3)
    ]
    made = run(scripted_server, asked, endpoint=endpoint, token_counts=token_counts)
    for request, record in zip(asked, made.requests, strict=True):
        prompt = request.prompt
        body: dict[str, Any] = {"max_tokens": request.max_tokens, "lora": request.adapter, **request.fields}
        body |= {"messages": [{"role": "user", "content": prompt}]} if endpoint == CHAT else {"prompt": prompt}
        status, answer = scripted_server.request("POST", endpoint, body)
        choices, usage = answer["choices"], answer["usage"]
        texts = [choice["message"]["content"] if endpoint == CHAT else choice["text"] for choice in choices]
        assert (status, record.error, len(texts)) == (200, None, request.fields["n"])
        assert (record.text, record.finish_reason) == ("\n".join(texts), choices[0]["finish_reason"])
        assert (record.prompt_tokens, record.output_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
        if token_counts:
            assert sum(event.tokens for event in record.events) == record.output_tokens


def test_what_the_server_refuses_is_in_the_record(scripted_server: Server) -> None:
    asked = [TracedRequest(0, 0.0, "a", 0, 4, "nobody"), TracedRequest(1, 0.0, "a", 0, 4, fields={"top_p": 7.0})]
    made = run(scripted_server, [*asked, TracedRequest(2, 0.0, [1, 2, 3], 3, 4)])
    errors = [record.error or "" for record in made.requests]
    assert errors[0].startswith("404: ") and "'nobody'" in errors[0]
    assert errors[1].startswith("400: top_p")
    assert errors[2] == "" and made.complete


def test_a_server_tells_what_it_is_made_of(scripted_server: Server) -> None:
    target = Target(url=scripted_server.url, engine="specserve", model="base")
    told = asyncio.run(ask_version(target))
    kept = {"device": "none", "dtype": "none", "weights": "fp8", "draft_weights": "none"}
    assert told.pop("version")
    assert told == kept
