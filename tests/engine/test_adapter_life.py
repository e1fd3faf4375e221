"""Adapters that come, go, change and break while requests use them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lawbook.zoo import Zoo
from specserve.core.errors import NotFoundError
from specserve.core.messages import AddRequest, LoadAdapter, LoraRef, RequestOutput, UnloadAdapter
from specserve.core.sampling_params import SamplingParams
from specserve.llm import LLM

Open = Callable[..., LLM]
PROMPT = [7, 9, 11, 20, 21, 22, 7, 9, 11]
WEIGHTS = "adapter_model.safetensors"


def add(llm: LLM, name: str, *adapters: str, max_tokens: int = 8, salt: str = "") -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    lora = tuple(LoraRef(adapter) for adapter in adapters)
    llm.engine.add_request(
        AddRequest(request_id=name, prompt_ids=PROMPT, params=params, seed=0, lora=lora, cache_salt=salt)
    )


def run(llm: LLM, *, reads: bool = True, steps: int = 1000) -> dict[str, list[RequestOutput]]:
    """Step until nothing more can happen; without `reads` no adapter's read is ever taken in."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(steps):
        if not llm.engine.has_work():
            break
        if reads:
            llm.engine.adapters.wait(10)
            llm.engine.poll_replies()
        for output in llm.engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def said(llm: LLM, *adapters: str, max_tokens: int = 8) -> list[int]:
    """What a request on these adapters says when it is alone."""
    add(llm, "alone", *adapters, max_tokens=max_tokens)
    return tokens(run(llm)["alone"])


@pytest.fixture
def folder(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a2 that a test may change."""
    return Path(shutil.copytree(zoo.adapters["near"]["a2"], tmp_path / "mine"))


def test_cold_adapter_waits_alone(open_llm: Open) -> None:
    truth = open_llm()
    llm = open_llm()
    said(llm, "a0")
    add(llm, "cold", "a1")
    add(llm, "warm", "a0")
    add(llm, "base")
    outputs = run(llm, reads=False, steps=60)
    assert set(outputs) == {"warm", "base"}
    assert tokens(outputs["warm"]) == said(truth, "a0") and tokens(outputs["base"]) == said(truth)
    assert tokens(run(llm)["cold"]) == said(truth, "a1")


def test_failing_read_fails_its_requests_alone(open_llm: Open, folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"no weights")
    llm = open_llm(loras=(("mine", str(folder)),))
    for name, adapters in (("one", ["mine"]), ("two", ["mine"]), ("base", [])):
        add(llm, name, *adapters)
    outputs = run(llm)
    for name in ("one", "two"):
        (output,) = outputs[name]
        assert output.finish_reason == "error" and output.error is not None
        assert output.error.code == "invalid_adapter" and "'mine'" in output.error.message
    assert len(tokens(outputs["base"])) == 8
    (folder / WEIGHTS).write_bytes(weights)
    assert said(llm, "mine") == said(open_llm(), "a2")


def test_slots_drain_towards_the_request_that_lacks_one(open_llm: Open) -> None:
    """One slot: the second adapter waits for it; the base passes by, and so many of the first adapter's requests as
    there are rows, but no more."""
    llm = open_llm(max_loras=1)
    said(llm, "a1")
    said(llm, "a0")  # both are in host memory now: nobody waits for a read
    asked = {"first": ["a0"], "second": ["a1"]} | {f"hot {i}": ["a0"] for i in range(8)} | {"base": []}
    for name, adapters in asked.items():
        add(llm, name, *adapters)
    outputs = run(llm)
    order = list(outputs)  # of their first tokens
    assert order.index("first") < 2 and order.index("base") < 4
    assert 1 <= sum(name.startswith("hot") for name in order[: order.index("second")]) <= llm.config.max_num_seqs
    truth = open_llm()
    for name, adapters in asked.items():
        assert tokens(outputs[name]) == said(truth, *adapters)


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "reading", "running"])
def test_unloaded_under_its_requests(steps: int, open_llm: Open) -> None:
    llm = open_llm(pipeline_depth=2)
    add(llm, "one", "a1")
    before = run(llm, steps=steps, reads=steps > 1).get("one", [])
    reply = llm.engine.handle(UnloadAdapter(call_id=1, name="a1"))
    assert reply is not None and reply.error is None
    with pytest.raises(NotFoundError):
        add(llm, "late", "a1")
    assert tokens(before + run(llm)["one"]) == said(open_llm(), "a1")
    assert "a1" not in {info.name for info in llm.engine.adapters.list()}
    llm.engine.check_integrity()


@pytest.mark.parametrize("depth", [1, 2])
def test_reloaded_under_its_requests(depth: int, zoo: Zoo, open_llm: Open) -> None:
    """Running requests end on the version they began with, also when they lose their blocks; later ones get the new."""
    truth = open_llm()
    old, new = said(truth, "a1", max_tokens=30), said(truth, "a2", max_tokens=30)
    llm = open_llm(pipeline_depth=depth, max_model_len=44, num_blocks=14)
    for name in ("one", "two"):
        add(llm, name, "a1", max_tokens=30)
    outputs = run(llm, steps=6)
    assert set(outputs) == {"one", "two"}
    llm.engine.handle(LoadAdapter(call_id=1, name="a1", path=str(zoo.adapters["near"]["a2"]), replace=True))
    while not llm.engine.poll_replies():
        llm.engine.adapters.wait(10)
    add(llm, "three", "a1", max_tokens=30)
    for name, more in run(llm).items():
        outputs.setdefault(name, []).extend(more)
    assert llm.engine.stats().preemptions > 0
    assert [tokens(outputs[name]) for name in ("one", "two", "three")] == [old, old, new]


def test_salt_and_adapters_part_the_prefix_cache(open_llm: Open) -> None:
    llm = open_llm()
    for adapters, salt in ((["a0"], ""), (["a1"], ""), ([], ""), ([], "pepper"), (["a0", "a1"], "")):
        cached = []
        for _ in range(2):
            add(llm, "r", *adapters, salt=salt)
            cached.append(run(llm)["r"][0].cached_tokens)
        assert cached == [0, 8]


@pytest.mark.parametrize("draft", [True, False])
def test_overflow_stays_with_its_request(draft: bool, zoo: Zoo, folder: Path, open_llm: Open) -> None:
    """An adapter of finite weights can make activations infinite; neighbours and later tenants of its blocks and its
    row do not notice."""
    for path in (folder / WEIGHTS, folder / "draft" / WEIGHTS):
        save_file({key: value * 1e25 for key, value in load_file(path).items()}, path)
    loras = (("huge", str(folder)), ("a0", str(zoo.adapters["near"]["a0"])))
    llm = open_llm(
        dtype="float32", enable_prefix_caching=False, loras=loras,
        draft_model=str(zoo.drafts["near"]) if draft else None, max_model_len=20, num_blocks=16,
    )  # fmt: skip
    base, a0 = said(llm), said(llm, "a0")
    for name, adapters in (("base", []), ("huge", ["huge"]), ("a0", ["a0"])):
        add(llm, name, *adapters)
    outputs = run(llm)
    assert tokens(outputs["base"]) == base and tokens(outputs["a0"]) == a0
    for name in ("one", "two", "three"):  # together they take every block
        add(llm, name)
    assert [tokens(one) for one in run(llm).values()] == [base] * 3
    assert said(llm, "a0") == a0
