"""One request's life at its edges: its last token, its stop tokens, its resumption, its drafts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lawbook.fakes import fakes
from specserve.core.errors import ContextLengthError, InvalidRequestError
from specserve.core.messages import AddRequest, RequestOutput
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.core.seeds import derive_seed
from specserve.llm import LLM, Output
from specserve.speculation.proposer import DraftBatch, Drafts

Open = Callable[..., LLM]
PROMPT = [7, 9, 11, 20, 21, 22, 7, 9, 11]
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def drafting(count: int, proposer: str = "draft_model", **fields: object) -> SamplingParams:
    speculation = SpeculationParams(num_draft_tokens=count, proposer=proposer, method="coupled")
    return SamplingParams(speculation=speculation, **fields)


def add(llm: LLM, **fields: object) -> None:
    defaults = {"request_id": "r", "prompt_ids": PROMPT, "params": SamplingParams(temperature=0.0), "seed": 3}
    llm.engine.add_request(AddRequest(**(defaults | fields)))


def drain(llm: LLM) -> list[RequestOutput]:
    outputs = []
    while llm.engine.has_work():
        llm.engine.poll_replies()
        outputs += llm.engine.step()
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def plain(llm: LLM, **fields: object) -> Output:
    return llm.generate([PROMPT], SamplingParams(speculation=NO_SPECULATION, **fields))[0]


# --- resuming -------------------------------------------------------------------------------------------------------


def test_resumed_at_the_end_of_the_context(open_llm: Open) -> None:
    llm = open_llm(max_model_len=16)
    add(llm, output_ids=[5] * (16 - len(PROMPT)))
    (output,) = drain(llm)
    assert output.finish_reason == "length" and output.token_ids == [] and output.error is None


def test_resumed_at_the_end_of_max_tokens(open_llm: Open) -> None:
    llm = open_llm()
    add(llm, output_ids=[5, 6], params=SamplingParams(max_tokens=2))
    assert [output.finish_reason for output in drain(llm)] == ["length"]


def test_resumed_beyond_the_context(open_llm: Open) -> None:
    llm = open_llm(max_model_len=16)
    with pytest.raises(ContextLengthError):
        add(llm, output_ids=[5] * 8)
    with pytest.raises(ContextLengthError):
        add(llm, prompt_ids=[5] * 16)
    assert not llm.engine.has_work()


def test_resumed_after_a_stop_token(open_llm: Open) -> None:
    llm = open_llm()
    params = SamplingParams(stop_token_ids=(6,), min_tokens=1)
    with pytest.raises(InvalidRequestError, match="stop token 6") as caught:
        add(llm, output_ids=[5, 6, 8], params=params)
    assert caught.value.param == "output_ids"
    add(llm, output_ids=[6, 5], params=params)  # before min_tokens it stopped nothing
    drain(llm)


def test_tokens_outside_the_vocabulary(open_llm: Open) -> None:
    llm = open_llm()
    for field in ("prompt_ids", "output_ids"):
        with pytest.raises(InvalidRequestError, match="holds token 61") as caught:
            add(llm, **{field: [5, 61]})
        assert caught.value.param == field.replace("prompt_ids", "prompt")


def test_same_id_twice(open_llm: Open) -> None:
    llm = open_llm()
    add(llm)
    with pytest.raises(InvalidRequestError, match="already running"):
        add(llm)
    llm.engine.abort_requests(["r"])
    add(llm)
    assert tokens_of(drain(llm)) == plain(llm, temperature=0.0).token_ids


# --- ends -----------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("count", [1, 4, 64])
def test_up_to_the_last_place_of_the_context(depth: int, count: int, open_llm: Open) -> None:
    """Rows draft and overrun at the context's end, next to each other and at different distances from it."""
    llm = open_llm(max_model_len=40, num_blocks=41, pipeline_depth=depth, max_num_batched_tokens=500)
    prompts = [PROMPT, [5] * 39, [8, 4] * 10]
    fields = {"temperature": 0.0, "ignore_eos": True}
    truth = llm.generate(prompts, SamplingParams(speculation=NO_SPECULATION, **fields))
    found = llm.generate(prompts, [drafting(count, name, **fields) for name in ("draft_model", "ngram", "draft_model")])
    assert [one.token_ids for one in found] == [one.token_ids for one in truth]
    assert [len(one.token_ids) for one in found] == [31, 1, 20]
    assert all(one.finish_reason == "length" for one in found)


def test_min_tokens_beyond_everything(open_llm: Open) -> None:
    output = open_llm().generate([PROMPT], SamplingParams(temperature=0.0, min_tokens=10**30))[0]
    assert len(output.token_ids) == 64 - len(PROMPT)


@DEPTHS
def test_stop_token_takes_no_logprob(depth: int, open_llm: Open) -> None:
    llm = open_llm(pipeline_depth=depth)
    free = plain(llm, temperature=0.0, ignore_eos=True, logprobs=2, max_tokens=20)
    stop = free.token_ids[8]
    first = free.token_ids.index(stop)
    found = llm.generate(
        [PROMPT], drafting(4, temperature=0.0, ignore_eos=True, logprobs=2, stop_token_ids=(stop,), max_tokens=20)
    )[0]
    assert found.token_ids == free.token_ids[:first]
    assert (found.finish_reason, found.stop_token_id) == ("stop", stop)
    assert found.logprobs is not None and free.logprobs is not None
    assert [one.token_id for one in found.logprobs] == found.token_ids
    for got, want in zip(found.logprobs, free.logprobs, strict=False):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-9)
        assert [token for token, _ in got.top] == [token for token, _ in want.top]


@DEPTHS
def test_processors_at_depth(depth: int, open_llm: Open) -> None:
    """What looks back (penalties, min_tokens) sees the tokens of the step in flight, beside rows that do not."""
    llm = open_llm(pipeline_depth=depth, proposers=fakes(()))
    free = plain(llm, temperature=0.0, ignore_eos=True, max_tokens=24).token_ids
    variants: list[dict[str, object]] = [
        {"temperature": 0.0, "repetition_penalty": 1.5, "frequency_penalty": 0.9},
        {"temperature": 0.0, "min_tokens": 12, "stop_token_ids": (free[2], free[5])},
        {"temperature": 0.9, "seed": 4, "presence_penalty": 1.5, "logit_bias": {5: 4.0, free[0]: -100.0}},
        {"temperature": 1.2, "seed": 8, "top_k": 7, "min_tokens": 9, "stop_token_ids": tuple(range(3, 30))},
    ]
    truth = [plain(llm, max_tokens=24, **fields) for fields in variants]
    for proposer in ("draft_model", "ngram", "random"):
        params = [drafting(count, proposer, max_tokens=24, **fields)
                  for count, fields in zip((4, 1, 3, 5), variants, strict=True)]  # fmt: skip
        found = llm.generate([PROMPT] * 4, params)
        assert [(one.token_ids, one.finish_reason) for one in found] == [
            (one.token_ids, one.finish_reason) for one in truth
        ]


def test_samples_are_derived_seeds(open_llm: Open) -> None:
    llm = open_llm()
    samples = llm.generate([PROMPT], drafting(3, temperature=1.0, seed=11, n=3, max_tokens=12))
    for index, sample in enumerate(samples):
        alone = plain(llm, temperature=1.0, seed=derive_seed(11, index), max_tokens=12)
        assert sample.token_ids == alone.token_ids
    assert len({tuple(sample.token_ids) for sample in samples}) == 3


def test_first_output_tells_the_wait(open_llm: Open) -> None:
    llm = open_llm(max_num_seqs=1)
    add(llm, params=SamplingParams(max_tokens=5))
    add(llm, request_id="s", params=SamplingParams(max_tokens=5))
    waits: dict[str, list[float | None]] = {"r": [], "s": []}
    for output in drain(llm):
        waits[output.request_id].append(output.queue_seconds)
    assert all(wait is None for one in waits.values() for wait in one[1:])
    assert waits["r"][0] is not None and waits["s"][0] is not None and waits["r"][0] < waits["s"][0]


# --- proposers ------------------------------------------------------------------------------------------------------


class Watcher:
    """A proposer on the host that notes whether the engine knew every token when it was asked."""

    name = "watcher"
    location = "host"
    keeps_kv = False

    def __init__(self) -> None:
        self.known: dict[int, int] = {}
        self.engine: LLM | None = None
        self.lags: list[int] = []

    def propose(self, batch: DraftBatch) -> Drafts:
        assert self.engine is not None
        lengths = {r.row: r.num_tokens for r in self.engine.engine.scheduler.running}
        for row, length in zip(batch.rows.tolist(), batch.num_tokens.tolist(), strict=True):
            self.lags.append(length - lengths[row])
        return Drafts(batch.num_tokens.new_full((len(batch.rows), batch.max_drafts), 5), batch.num_tokens * 0 + 1)


def test_host_proposer_sees_committed_tokens(open_llm: Open) -> None:
    """It comes into an engine that runs two steps deep."""
    watcher = Watcher()
    llm = open_llm(pipeline_depth=2, proposers=[watcher])
    watcher.engine = llm
    add(llm, params=SamplingParams(temperature=0.0, speculation=NO_SPECULATION))
    for _ in range(5):
        llm.engine.step()
    add(llm, request_id="host", params=drafting(2, "watcher", temperature=0.0, ignore_eos=True, max_tokens=10))
    drain(llm)
    assert watcher.lags and set(watcher.lags) == {0}
