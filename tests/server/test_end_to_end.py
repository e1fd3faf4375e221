"""The real server, engine and openai client, with transformers and peft as oracles."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from serverkit.processes import DEADLINE, Server, kit_environment, wait_until
from serverkit.tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer()
PROMPTS = ["the quick brown fox", "pack my box", "héllo wörld"]
ALPHABET = [chr(code) for code in range(33, 127)]  # one token each
CLI = "specserve.cli.main"


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("draft") / "model", seed=3, layers=1)


@pytest.fixture(scope="module")
def server(tiny: Path, draft: Path) -> Iterator[Server]:
    server = Server(
        CLI,
        [
            *("serve", str(tiny / "model"), "--draft-model", str(draft), "--served-model-name", "base"),
            *("--lora", f"one={tiny / 'adapters' / 'one'}", "--adapter-root", str(tiny / "adapters")),
            *("--port", "0", "--num-draft-tokens", "3", "--kv-cache-bytes", str(1 << 24)),
        ],
    )
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy_oracle(model: Path, adapters: Sequence[Path], prompt_ids: list[int], count: int) -> list[int]:
    """transformers' greedy tokens, end-of-text among them as `ignore_eos` has it."""
    base = LlamaForCausalLM.from_pretrained(model)
    for adapter in adapters:
        base = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    ids = torch.tensor([prompt_ids])
    out = base.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=-1
    )
    return [int(token) for token in out[0, len(prompt_ids) :]]


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> dict[str, Any]:
    """One choice as a dictionary, `token_ids` among its fields."""
    names = set(fields) - {"max_tokens", "temperature", "seed", "stop", "n"}
    extra = {"return_token_ids": True, "ignore_eos": True} | {name: fields.pop(name) for name in names}
    answer = client.completions.create(model="base", prompt=prompt, extra_body=extra, **fields)
    return answer.to_dict()["choices"][0]  # type: ignore[index, return-value]


@pytest.mark.parametrize("lora", [None, "one"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_transformers(client: openai.OpenAI, tiny: Path, prompt: str, lora: str | None) -> None:
    adapters = [] if lora is None else [tiny / "adapters" / lora]
    want = greedy_oracle(tiny / "model", adapters, TOKENIZER.encode(prompt), 24)
    for speculation in (True, False):
        got = complete(client, prompt, max_tokens=24, temperature=0, lora=lora, speculation=speculation)
        assert got["token_ids"] == want
        assert got["text"] == TOKENIZER.decode(want, skip_special_tokens=True)


def test_a_mixed_batch_is_each_alone(server: Server, tiny: Path) -> None:
    """Base and adapters, all at once, streamed; one adapter is loaded just before."""
    assert server.request("POST", "/v1/adapters", {"name": "two", "path": str(tiny / "adapters" / "two")})[0] == 201
    mix: list[tuple[str, str | None]] = [(prompt, lora) for prompt in PROMPTS for lora in (None, "one", "two")]

    async def run() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            return list(await asyncio.gather(*(one(client, *case) for case in mix)))

    async def one(client: openai.AsyncOpenAI, prompt: str, lora: str | None) -> list[int]:
        extra = {"lora": lora, "return_token_ids": True, "ignore_eos": True}
        stream = await client.completions.create(
            model="base", prompt=prompt, max_tokens=16, temperature=0, stream=True, extra_body=extra
        )
        return [token async for chunk in stream for token in chunk.choices[0].to_dict()["token_ids"]]  # type: ignore[union-attr]

    for (prompt, lora), got in zip(mix, asyncio.run(run()), strict=True):
        adapters = [] if lora is None else [tiny / "adapters" / lora]
        assert got == greedy_oracle(tiny / "model", adapters, TOKENIZER.encode(prompt), 16)


def test_seeded_text_does_not_depend_on_speculation(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 0.8, "seed": 5}
    plain = complete(client, PROMPTS[0], speculation=False, **fields)
    for speculation in ({"num_draft_tokens": 1}, {"num_draft_tokens": 4}, {"proposer": "ngram", "num_draft_tokens": 2}):
        assert complete(client, PROMPTS[0], speculation=speculation, **fields) == plain


@pytest.mark.parametrize("speculation", [False, {"num_draft_tokens": 4}])
def test_bad_words(client: openai.OpenAI, speculation: Any) -> None:
    """Of a text and of a chat: the words' tokens are gone."""
    fields: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True, "speculation": speculation}

    def say(bad_words: list[str]) -> list[list[int]]:
        extra = fields | {"bad_words": bad_words}
        text = client.completions.create(
            model="base", prompt=PROMPTS[0], max_tokens=16, temperature=0, extra_body=extra
        )
        chat = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=16, temperature=0, extra_body=extra
        )
        return [answer.to_dict()["choices"][0]["token_ids"] for answer in (text, chat)]  # type: ignore[index]

    free = say([])
    words = [word for word in ALPHABET if any(TOKENIZER.encode(word)[0] in tokens for tokens in free)]
    bad = {TOKENIZER.encode(word)[0] for word in words}
    assert all(bad & set(tokens) for tokens in free)
    assert not any(bad & set(tokens) for tokens in say(words))


def test_usage_tells_of_speculation_and_cache(client: openai.OpenAI) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    for _ in range(2):
        answer = client.completions.create(
            model="base", prompt=prompt, max_tokens=20, temperature=0,
            extra_body={"speculation": {"num_draft_tokens": 3}},
        )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(prompt))
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 16
    speculation: Any = answer.usage.to_dict()["speculation"]
    assert speculation["rounds"] > 0
    assert speculation["drafted"] >= speculation["accepted"] == sum(speculation["accepted_per_position"])


def test_logprobs_are_the_targets(client: openai.OpenAI, tiny: Path) -> None:
    answer = client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0, logprobs=True,
        top_logprobs=3, extra_body={"return_token_ids": True, "ignore_eos": True},
    )  # fmt: skip
    choice: Any = answer.to_dict()["choices"][0]  # type: ignore[index]
    prompt_ids = TOKENIZER.encode("<s><|user|>hi<|assistant|>", add_special_tokens=False)
    whole = torch.tensor([prompt_ids + choice["token_ids"]])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(tiny / "model")(whole).logits[0, len(prompt_ids) - 1 : -1]
    want = torch.log_softmax(logits, -1)
    for position, entry in enumerate(choice["logprobs"]["content"]):
        assert entry["logprob"] == pytest.approx(float(want[position, choice["token_ids"][position]]), abs=1e-4)
        top = want[position].topk(3).values.tolist()
        assert [alternative["logprob"] for alternative in entry["top_logprobs"]] == pytest.approx(top, abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"temperature": 0}, marks=pytest.mark.slow, id="greedy"),
        pytest.param({"temperature": 1.0, "seed": 3}, marks=pytest.mark.slow, id="seeded"),
        pytest.param({"temperature": 1.0, "seed": 3, "lora": "late"}, id="seeded, adapter loaded while running"),
    ],
)
def test_killed_engine_comes_back_and_the_stream_resumes(server: Server, tiny: Path, fields: dict[str, Any]) -> None:
    server.request("POST", "/v1/adapters", {"name": "late", "path": str(tiny / "adapters" / "two")})
    body = {"prompt": PROMPTS[0], "max_tokens": 300, "ignore_eos": True, "return_token_ids": True} | fields
    status, undisturbed = server.request("POST", "/v1/completions", body)
    assert status == 200
    whole = undisturbed["choices"][0]

    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        extra = {name: body[name] for name in body if name not in ("prompt", "max_tokens", "temperature", "seed")}
        text, tokens, killed = "", [], 0
        with pytest.raises(openai.APIError) as raised:
            for chunk in client.completions.create(
                model="base", prompt=PROMPTS[0], max_tokens=300, temperature=fields["temperature"],
                seed=fields.get("seed"), stream=True, extra_body=extra,
            ):  # fmt: skip
                text += chunk.choices[0].text
                tokens += chunk.choices[0].to_dict()["token_ids"]  # type: ignore[operator]
                if not killed:
                    killed = server.engine_pid()
                    os.kill(killed, signal.SIGKILL)
    error: Any = raised.value.body
    assert error["code"] == "engine_dead"
    (point,) = error["specserve"]["resume"]
    assert point["output_ids"] == tokens
    assert 0 < len(tokens) < 300
    wait_until(lambda: server.request("GET", "/ready")[0] == 200, "another engine is ready")
    assert server.engine_pid() != killed

    status, resumed = server.request("POST", "/v1/completions", body | {"output_ids": point["output_ids"]})
    assert status == 200, resumed
    assert tokens + resumed["choices"][0]["token_ids"] == whole["token_ids"]
    assert text + resumed["choices"][0]["text"] == whole["text"]


def test_broken_adapters_are_refused_and_the_server_unharmed(server: Server, tiny: Path) -> None:
    broken = tiny / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    status, answer = server.request("POST", "/v1/adapters", {"name": "broken", "path": str(broken)})
    assert (status, answer["error"]["code"]) == (400, "invalid_adapter")
    assert server.request("GET", "/v1/adapters/broken")[0] == 404
    assert server.request("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("empty", "config only", "broken weights")),
        pytest.param("broken adapter", marks=pytest.mark.slow),
    ],
)
def test_unreadable_model_is_one_sentence(tiny: Path, tmp_path: Path, what: str) -> None:
    model, args = tmp_path / "model", []
    if what != "missing":
        model.mkdir()
    if what in ("config only", "broken weights"):
        (model / "config.json").write_bytes((tiny / "model" / "config.json").read_bytes())
    if what == "broken weights":
        (model / "model.safetensors").write_bytes(b"x" * 100)
    if what == "broken adapter":
        model, args = tiny / "model", ["--lora", f"x={tmp_path}"]
    command = [sys.executable, "-m", CLI, "serve", str(model), "--port", "0", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=kit_environment(), timeout=DEADLINE, check=False)
    assert done.returncode == 2, done.stderr
    *bars, sentence = done.stderr.splitlines()
    assert sentence.startswith("specserve: ")
    assert all(not bar or bar.startswith("Loading weights of model: ") for bar in bars), done.stderr
    assert not bars or what != "broken adapter"  # refused before anything is loaded
