"""The real openai client against a server over the scripted core, which echoes greedy prompts."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serverkit.processes import Server
from serverkit.tiny import make_tokenizer

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def client(scripted_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=scripted_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def test_completion(client: openai.OpenAI) -> None:
    prompt = "the quick"
    answer = client.completions.create(model="base", prompt=prompt, max_tokens=2 * len(ids(prompt)), temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (prompt * 2, "length", 0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids(prompt))
    assert answer.usage.completion_tokens == 2 * len(ids(prompt))
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    speculation = answer.usage.to_dict()["speculation"]
    assert isinstance(speculation, dict)
    assert set(speculation) == {*("rounds", "drafted", "accepted", "drafted_per_position", "accepted_per_position")}
    assert speculation["drafted"] == 2 * speculation["rounds"]


@pytest.mark.parametrize(
    "prompt", ["ab", ["ab", "cd"], ids("ab"), [ids("ab"), ids("cd")]], ids=["text", "texts", "ids", "lists of ids"]
)
def test_shapes_of_prompt(client: openai.OpenAI, prompt: Any) -> None:
    answer = client.completions.create(model="base", prompt=prompt, max_tokens=2, temperature=0, n=2)
    want = ["ab", "ab", "cd", "cd"] if isinstance(prompt[0], list) or prompt[0] == "ab" else ["ab", "ab"]
    assert [choice.text for choice in answer.choices] == want
    assert [choice.index for choice in answer.choices] == list(range(len(want)))


def test_completion_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="base", prompt="ab")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_stream_is_the_whole_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": ["héllo 🙂", "x"], "max_tokens": 30, "n": 2, "seed": 4}
    whole = client.completions.create(**fields)
    texts = [""] * 4
    reasons: list[str | None] = [None] * 4
    usage = None
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
        assert chunk.usage is None or not chunk.choices
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length"] * 4
    assert usage == whole.usage


def test_a_chat_tells_of_speculation_streamed_or_not(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 12}
    whole = client.chat.completions.create(**fields, seed=3)
    assert whole.usage is not None
    speculation: Any = whole.usage.to_dict()["speculation"]
    assert sum(speculation["drafted_per_position"]) == speculation["drafted"] > 0
    assert sum(speculation["accepted_per_position"]) == speculation["accepted"]
    *_, last = client.chat.completions.create(**fields, seed=3, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage


def test_same_seed_same_text(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": "abc", "max_tokens": 20}
    one, again, other = [client.completions.create(**fields, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert one == again != other


def test_one_event_a_step_and_stream(scripted_server: Server) -> None:
    """The scripted core gives 1, 2, 3, 1, 2, … tokens a step."""
    body = {"prompt": "abcdef", "max_tokens": 10, "temperature": 0, "stream": True, "return_token_ids": True}
    request = urllib.request.Request(scripted_server.url + "/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in response.read().decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    steps = [chunk["choices"][0]["token_ids"] for chunk in chunks]
    assert [token for step in steps for token in step] == (ids("abcdef") * 2)[:10]
    assert max(map(len, steps)) > 1
    assert all(steps)


def test_stop_strings(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": "ab|cd", "max_tokens": 50, "temperature": 0, "stop": "|c"}
    answer = client.completions.create(**fields)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    assert answer.choices[0].to_dict()["stop_reason"] == "|c"
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True)]
    assert "".join(pieces) == "ab"
    included = client.completions.create(**fields, extra_body={"include_stop_str_in_output": True})
    assert included.choices[0].text == "ab|c"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(client: openai.OpenAI, stream: bool) -> None:
    fields: dict[str, Any] = {"model": "base", "prompt": "ab€", "max_tokens": 6, "temperature": 0, "logprobs": 2}
    answers = (
        list(client.completions.create(**fields, stream=True)) if stream else [client.completions.create(**fields)]
    )
    parts = [answer.choices[0].logprobs for answer in answers]
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == ["a", "b", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "a"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 2, 2, 3]
    assert [logprob for part in parts for logprob in part.token_logprobs] == [-0.5] * 6
    for token, top in zip(tokens, (top for part in parts for top in part.top_logprobs), strict=True):
        assert top[token] == -0.5
        assert sorted(top.values()) == [-1.5, -0.5]


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    answer = client.chat.completions.create(model="base", messages=messages, temperature=0)
    rendered = TOKENIZER.encode("<s><|user|>hi<|assistant|>", add_special_tokens=False)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(rendered)
    assert answer.usage.total_tokens == 512  # what fits is the default
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content is not None
    assert message.content.startswith("hihi")  # special tokens are not shown


def test_chat_stream(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        **{"model": "base", "messages": [{"role": "user", "content": "hey"}], "max_completion_tokens": 9, "n": 2},
        **{"seed": 1, "logprobs": True, "top_logprobs": 3},
    }
    whole = client.chat.completions.create(**fields)
    texts, roles, logprobs = ["", ""], ["", ""], [[], []]
    for chunk in client.chat.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role or ""
        logprobs[choice.index] += choice.logprobs.content
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant", "assistant"]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content == logprobs[choice.index]
        entry = choice.logprobs.content[0]
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes or []).decode(errors="replace") != "" or entry.token == ""


async def test_async_client(scripted_server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=scripted_server.url + "/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="one", messages=[{"role": "user", "content": "hey"}], max_tokens=5, temperature=0, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {"one"}
    assert chunks[-1].choices[0].finish_reason == "length"


def test_adapter_in_either_field(client: openai.OpenAI, scripted_server: Server) -> None:
    def requests() -> int:
        return int(scripted_server.request("GET", "/v1/adapters/one")[1]["requests"])

    before = requests()
    client.completions.create(model="one", prompt="a", max_tokens=1)
    client.completions.create(model="base", prompt="a", max_tokens=1, extra_body={"lora": "one"})
    client.completions.create(
        model="base", prompt="a", max_tokens=1, extra_body={"lora": [{"name": "one", "scale": 2}]}
    )
    client.completions.create(model="base", prompt="a", max_tokens=1, extra_body={"lora": None})
    assert requests() == before + 3


def test_models(client: openai.OpenAI) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    assert models["base"]["parent"] is None
    assert models["one"]["parent"] == "base"
    assert str(models["one"]["root"]).endswith("one")
    assert client.models.retrieve("one").id == "one"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="a")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt=[5] * 600)
    assert long.value.code == "context_length_exceeded"


def test_tokenize_and_back(scripted_server: Server) -> None:
    status, answer = scripted_server.request("POST", "/tokenize", {"prompt": "héllo 🙂", "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == ids("héllo 🙂")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    back = scripted_server.request("POST", "/detokenize", {"tokens": answer["tokens"], "model": "one"})
    assert back == (200, {"prompt": "héllo 🙂"})
    _, chat = scripted_server.request("POST", "/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    assert chat["tokens"] == TOKENIZER.encode("<s><|user|>hi<|assistant|>", add_special_tokens=False)
