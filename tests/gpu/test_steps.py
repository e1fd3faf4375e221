"""Steps on a CUDA device: nothing in them waits for the device, and a replayed graph does what its launches do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from specserve.config import EngineConfig
from specserve.core.messages import AddRequest, LoraRef, RequestOutput, TokenLogprobs
from specserve.core.plan import AdapterLoad, StepPlan
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.engine.core.core import EngineCore
from specserve.llm import LLM
from specserve.runtime.layout import StepLayout
from specserve.runtime.ticket import Ticket
from specserve_kernels.tolerances import MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["def read_lines(path):\n", "SELECT name, count(*) FROM", "function map(list, f) {", "Return the number of"]
LORAS = [None, "sql", "javascript", [LoraRef("docs", 0.5), LoraRef("sql", 0.7)]]


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Any call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WatchedExecutor:
    """An executor whose submissions must not wait."""

    def __init__(self, core: EngineCore) -> None:
        self._runner = core.built.runner
        self.steps = 0

    def submit(self, plan: StepPlan) -> Ticket:
        self.steps += 1
        with no_synchronization():
            return self._runner.submit(plan)

    def loaded(self) -> list[AdapterLoad]:
        with no_synchronization():
            return self._runner.loaded()


def run(core: EngineCore, params: SamplingParams, loras: list[Any]) -> dict[str, list[int]]:
    """Token ids of requests that come in one after another, so that prefill and decode share steps."""
    waiting = [
        AddRequest(request_id=str(i), prompt_ids=list(range(5 + i, 40 + 7 * i)), params=params, seed=i, lora=lora)
        for i, lora in enumerate(loras)
    ]
    tokens: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    while waiting or core.has_work():
        if waiting:
            core.add_request(waiting.pop(0))
        core.poll_replies()
        for _ in range(3):
            outputs: list[RequestOutput] = core.step()
            for output in outputs:
                assert output.error is None
                tokens[output.request_id] += output.token_ids
    return tokens


SETTINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "logprobs": SamplingParams(temperature=0.0, logprobs=2),
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(temperature=0.5, frequency_penalty=0.3, repetition_penalty=1.1, logit_bias={7: 1.0}),
    "min_tokens": SamplingParams(temperature=0.0, min_tokens=5),
    "bad_words": SamplingParams(temperature=0.8, bad_words_token_ids=((7,), (8, 9), (7, 8, 9, 10))),
}
SPECULATION = {
    "none": SpeculationParams(num_draft_tokens=0),
    "draft_model": SpeculationParams(num_draft_tokens=3, proposer="draft_model"),
    "ngram": SpeculationParams(num_draft_tokens=3, proposer="ngram"),
    "rejection": SpeculationParams(num_draft_tokens=2, proposer="draft_model", method="rejection"),
    "suffix": SpeculationParams(num_draft_tokens=3, proposer="suffix"),
    "ngram+draft_model": SpeculationParams(num_draft_tokens=2, proposer="ngram+draft_model", method="rejection"),
}


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    core = EngineCore(EngineConfig(model="demo", device="cuda", dtype="bfloat16", num_blocks=400, max_num_seqs=16))
    # Every adapter is read before; reading is not part of a step.
    run(core, SamplingParams(temperature=0.0, max_tokens=2), [(LoraRef(name),) for name in ("sql", "docs")])
    yield core
    core.close()


@pytest.mark.parametrize("speculation", SPECULATION)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_never_waits_for_the_device(core: EngineCore, setting: str, speculation: str) -> None:
    params = replace(SETTINGS[setting], max_tokens=12, ignore_eos=True, speculation=SPECULATION[speculation])
    loras = [(), (LoraRef("sql"),), (LoraRef("docs", 0.5), LoraRef("sql", 0.7))]
    run(core, params, loras)  # compiles what was not yet
    watched = core.executor = WatchedExecutor(core)
    tokens = run(core, params, loras)
    core.executor = core.built.runner
    assert watched.steps > 5
    assert all(len(ids) == 12 for ids in tokens.values())


def test_loads_never_wait_either() -> None:
    """Adapters take turns in one slot, loaded anew each time beside the steps: nobody notices but by the clock."""
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    params = replace(params, speculation=SpeculationParams(num_draft_tokens=0))
    loras = [(LoraRef(name),) if name else () for name in ("sql", "docs", "", "javascript", "sql")]
    tokens = []
    for slots in (1, 8):
        core = EngineCore(
            EngineConfig(model="demo", device="cuda", dtype="float32", num_blocks=400, max_num_seqs=16, max_loras=slots)
        )
        run(core, params, loras)  # all are read, and what was not yet is compiled
        before = core.adapters.stats().loads
        core.executor = WatchedExecutor(core)
        tokens.append(run(core, params, loras))
        loads = core.adapters.stats().loads - before
        assert loads >= 2 if slots == 1 else loads == 0
        assert core.adapters.num_loading == 0
        core.close()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_does_what_its_launches_do(dtype: str) -> None:
    """Padded batches, with adapters and without: in float32 the same tokens, log-probabilities within tolerance. (A
    padded product may sum in another order, so bits may differ.)"""
    params = SamplingParams(
        temperature=0.0, max_tokens=24, logprobs=1, ignore_eos=True, speculation=SpeculationParams(num_draft_tokens=0)
    )
    eager, graphs = (_outputs(dtype, params, enforce_eager=value) for value in (True, False))
    rtol, atol = MODEL[getattr(torch, dtype)]
    for mine, wanted in zip(graphs, eager, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(mine[0], wanted[0], strict=True)) if a != b), len(mine[0]))
        assert dtype != "float32" or same == len(mine[0])
        torch.testing.assert_close(torch.tensor(mine[1][:same]), torch.tensor(wanted[1][:same]), rtol=rtol, atol=atol)


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_a_graph_of_mixed_steps_does_what_its_launches_do(num_drafts: int) -> None:
    """Prompts come one after another and are cut into chunks beside others' decodes or verifications, so that each step
    is another mix: the same tokens in float32, log-probabilities within tolerance. In bfloat16 the demo's logits, which
    are of order 10, differ by tenths now and then: there graphs must be as near to the truth as launches are."""
    (eager, none), (graphs, replayed) = (_mixed("float32", num_drafts, enforce_eager=value) for value in (True, False))
    assert not none and len({tokens for tokens in replayed if tokens > 64}) >= 2, replayed
    rtol, atol = MODEL[torch.float32]
    for name, wanted in eager.items():
        assert [entry.token_id for entry in graphs[name]] == [entry.token_id for entry in wanted]
        assert len(wanted) == 24
        values, expected = ([entry.logprob for entry in entries] for entries in (graphs[name], wanted))
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=rtol, atol=atol)
    launched, replayed_error = (
        _error(_mixed("bfloat16", num_drafts, enforce_eager=value)[0], eager) for value in (True, False)
    )
    assert 0 < replayed_error <= 1.5 * launched


def _error(found: dict[str, list[TokenLogprobs]], truth: dict[str, list[TokenLogprobs]]) -> float:
    """Of log-probabilities, a mean over all tokens until the texts part."""
    errors: list[float] = []
    for name, entries in found.items():
        for mine, wanted in zip(entries, truth[name], strict=True):
            if mine.token_id != wanted.token_id:
                break
            errors.append(abs(mine.logprob - wanted.logprob))
    assert len(errors) >= 24
    return sum(errors) / len(errors)


def _mixed(dtype: str, num_drafts: int, *, enforce_eager: bool) -> tuple[dict[str, list[TokenLogprobs]], list[int]]:
    """Log-probabilities of each request, and how many tokens the steps had that were replayed as ragged graphs."""
    speculation = SpeculationParams(num_draft_tokens=num_drafts, proposer="ngram" if num_drafts else None)
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=1, ignore_eos=True, speculation=speculation)
    core = EngineCore(
        EngineConfig(
            model="demo", device="cuda", dtype=dtype, num_blocks=400, max_num_seqs=16, max_num_batched_tokens=200,
            enforce_eager=enforce_eager,
        )
    )  # fmt: skip
    replayed: list[int] = []
    graphs = core.built.runner.graphs
    for ragged in [] if graphs is None else graphs.ragged:
        run = ragged.run

        def counted(layout: StepLayout, run: Callable[[StepLayout], torch.Tensor] = run) -> torch.Tensor:
            replayed.append(layout.token_rows.shape[0])
            return run(layout)

        ragged.run = counted  # type: ignore[method-assign]
    loras = [(), (LoraRef("sql"),), (LoraRef("docs", 0.5), LoraRef("sql", 0.7)), (), (LoraRef("javascript"),)]
    waiting = [
        AddRequest(
            request_id=f"{length}", prompt_ids=[7 + i % 40 for i in range(length)], params=params, seed=1, lora=lora
        )
        for length, lora in zip((3, 350, 17, 90, 600), loras, strict=True)
    ]
    entries: dict[str, list[TokenLogprobs]] = {request.request_id: [] for request in waiting}
    while waiting or core.has_work():
        if waiting:
            core.add_request(waiting.pop(0))
        core.poll_replies()
        for output in core.step():
            assert output.error is None
            entries[output.request_id] += output.logprobs or []
    core.close()
    return entries, replayed


def _outputs(dtype: str, params: SamplingParams, *, enforce_eager: bool) -> list[tuple[list[int], list[float]]]:
    llm = LLM(model="demo", device="cuda", dtype=dtype, num_blocks=400, max_num_seqs=16, enforce_eager=enforce_eager)
    outputs = [*llm.generate(PROMPTS * 3, params, LORAS * 3), *llm.generate(PROMPTS[:3], params)]
    llm.close()
    return [(o.token_ids, [entry.logprob for entry in o.logprobs or []]) for o in outputs]
