"""Proposers that listen are told every request's text, once and whole, under a key of its adapters and salt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lawbook.fakes import fakes
from specserve.core.messages import AddRequest, LoraRef, RequestOutput
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM
from specserve.speculation.proposer import DraftBatch, Drafts

Open = Callable[..., LLM]
PROMPT = [7, 9, 11, 20, 21, 22, 7, 9, 11]
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


class Secretary:
    """Writes down what it is told, and drafts nonsense for requests that it knows; fails for others."""

    name, location, keeps_kv = "secretary", "host", False

    def __init__(self) -> None:
        self.texts: dict[str, list[int]] = {}
        self.keys: dict[str, bytes] = {}
        self.seen: dict[str, int] = {}
        self.ended: list[str] = []
        self.lengths_right = True

    def begin(self, request_id: str, key: bytes, token_ids: Sequence[int], num_seen: int) -> None:
        assert request_id not in self.texts
        self.texts[request_id], self.keys[request_id], self.seen[request_id] = list(token_ids), key, num_seen

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        assert request_id not in self.ended and len(token_ids)
        self.texts[request_id] += token_ids

    def end(self, request_id: str) -> None:
        self.ended.append(request_id)

    def propose(self, batch: DraftBatch) -> Drafts:
        known = [len(self.texts[name]) for name in batch.request_ids]
        self.lengths_right &= known == batch.num_tokens.tolist()
        return Drafts(torch.full((len(known), batch.max_drafts), 5), batch.limits)


def request(name: str, proposer: str = "secretary", **fields: object) -> AddRequest:
    speculation = SpeculationParams(num_draft_tokens=2, proposer=proposer)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, speculation=speculation)
    defaults = {"request_id": name, "prompt_ids": PROMPT, "params": params, "seed": 3}
    return AddRequest(**(defaults | fields))


def answers(llm: LLM, requests: list[AddRequest], aborts: dict[int, str] | None = None) -> dict[str, list[int]]:
    """Prompt and output of each; `aborts` by step."""
    texts = {asked.request_id: [*asked.prompt_ids, *asked.output_ids] for asked in requests}
    for asked in requests:
        llm.engine.add_request(asked)
    step = 0
    while llm.engine.has_work():
        llm.engine.abort_requests([aborts[step]] if aborts and step in aborts else [])
        llm.engine.poll_replies()
        outputs: list[RequestOutput] = llm.engine.step()
        for output in outputs:
            texts[output.request_id] += output.token_ids
        step += 1
    return texts


@DEPTHS
@pytest.mark.parametrize("proposer", ["secretary", "secretary+draft_model", "ngram+secretary"])
def test_texts_are_told_whole(depth: int, proposer: str, open_llm: Open) -> None:
    """Some preempt each other, one is aborted, one resumes, one drafts with somebody else."""
    secretary = Secretary()
    llm = open_llm(pipeline_depth=depth, num_blocks=18, proposers=[*fakes(()), secretary])
    loras = [(), (LoraRef("a0"),), (LoraRef("a1"),), (LoraRef("a0"),), ()]
    asked = [request(str(index), proposer, lora=lora) for index, lora in enumerate(loras)]
    asked.append(request("resumed", proposer, output_ids=[5, 6, 7]))
    asked.append(request("other", "draft_model"))
    texts = answers(llm, asked, aborts={9: "3"})
    assert llm.engine.stats().preemptions > 0
    del texts["other"]
    assert secretary.lengths_right
    assert secretary.texts == {name: text for name, text in texts.items() if name in secretary.texts}
    assert set(secretary.texts) >= set(texts) - {"3"}
    assert sorted(secretary.ended) == sorted(texts)
    assert not llm.engine._listening._told


def test_keys_are_the_adapters_and_the_salt(open_llm: Open) -> None:
    secretary = Secretary()
    llm = open_llm(proposers=[secretary])
    a0, a1, half = (LoraRef("a0"),), (LoraRef("a1"),), (LoraRef("a0", 0.5),)
    kinds: list[dict[str, object]] = [{}, {"lora": a0}, {"lora": a1}, {"lora": half}, {"cache_salt": "mine"}]
    asked = [request(f"{round_} {index}", **kind) for round_ in range(2) for index, kind in enumerate(kinds)]
    for one in asked:
        answers(llm, [one])
    first, second = (tuple(secretary.keys[f"{round_} {index}"] for index in range(5)) for round_ in range(2))
    assert first == second and len(set(first)) == len(kinds)
    assert [secretary.seen[one.request_id] for one in asked] == [0] * 5 + [8] * 5  # two blocks of four


def test_what_was_never_begun_ends_too(open_llm: Open) -> None:
    secretary = Secretary()
    llm = open_llm(max_num_seqs=1, proposers=[secretary])
    texts = answers(llm, [request("first"), request("waits")], aborts={3: "waits"})
    assert secretary.texts == {"first": texts["first"]}
    assert sorted(secretary.ended) == ["first", "waits"]


def test_suffixes_are_of_ones_own_adapter(open_llm: Open) -> None:
    """A text that was written once is drafted whole the next time, and for nobody else."""
    llm = open_llm(max_model_len=128, num_blocks=100)
    a0, a1 = (LoraRef("a0"),), (LoraRef("a1"),)
    prompt = [(7 * index * index) % 50 + 3 for index in range(20)]

    def accepted(lora: tuple[LoraRef, ...], salt: str = "") -> tuple[list[int], float]:
        before = llm.engine.stats()
        asked = request("r", "suffix", lora=lora, cache_salt=salt, prompt_ids=prompt)
        text = answers(llm, [asked])["r"]
        after = llm.engine.stats()
        return text, after.num_accepted_tokens - before.num_accepted_tokens

    (text, first), (again, second) = accepted(a0), accepted(a0)
    assert text == again and first < second and second >= 10
    other, by_itself = accepted(a1)
    assert other != text
    salted, apart = accepted(a0, "mine")
    assert salted == text and apart == first  # as if nobody had written it before
    plain = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True,
                                                  speculation=NO_SPECULATION), lora=["a0"])  # fmt: skip
    assert [*prompt, *plain[0].token_ids] == text
    assert by_itself <= second
