"""The whole engine through Triton kernels says what it says through the references, in float32, token for token.

This holds what tests of single kernels cannot: that they are handed the right tensors, strides and metadata. Where
there is no GPU the kernels are interpreted and a graph is its work done again; so texts are short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from msgspec.structs import replace as with_fields
from torch import Tensor

from lawbook.cases import Case
from lawbook.engines import open_engine, run
from lawbook.mixes import Ask, Lora, asks, prompt, speculating
from lawbook.zoo import Zoo, build_zoo
from specserve.core.messages import LoraRef
from specserve.layers import attention as attention_layer
from specserve.layers import storage
from specserve.llm import LLM, Output
from specserve.runtime import step_graphs as step_graphs_module
from specserve.runtime.capture import GraphSet
from specserve.runtime.step_graphs import Sizes
from specserve_kernels import dispatch
from specserve_kernels.attention import paged
from specserve_kernels.lora import grouped as lora_grouped
from specserve_kernels.lora import load as lora_load
from specserve_kernels.lora.grouped import GroupedLora
from specserve_kernels.tolerances import MODEL

MAX_NUM_SEQS = 4
LOADED = ("a0", "a3")
MIXED: tuple[Lora, ...] = ((), (LoraRef("a0"),), (LoraRef("a3", 0.5), LoraRef("a0", -1.0)))


@dataclass(frozen=True)
class Scenario:
    """Requests as `lengths` of prompts with `loras`, k = 0 and then `drafts` a step of the case's proposer.

    `budget`: tokens a step; `graphs`: whether steps are captured where there is no GPU (there is no choice on one).
    Later rounds find the prompts of the first in the prefix cache.
    """

    case: Case
    lengths: tuple[int, ...]
    loras: tuple[Lora, ...] = ((),)
    drafts: tuple[int, ...] = (0, 2)
    budget: int | None = None
    graphs: bool = False
    num_new: int = 2  # of the first request, each of the others one more
    fused: bool = False  # whether attention takes raw qkv where it can
    behind: bool = False  # whether A lies behind the weights, however many rows that takes

    def batch(self, num_drafts: int) -> list[Ask]:
        """Every request with the processors of its place, and log-probabilities."""
        drawn = asks(self.case.mix, sampled=self.case.sampled)[1 : 1 + len(self.lengths)]
        batch = [
            replace(
                ask,
                prompt=prompt(index, length),
                lora=self.loras[index % len(self.loras)],
                params=with_fields(ask.params, max_tokens=self.num_new + index, logprobs=2),
            )
            for index, (ask, length) in enumerate(zip(drawn, self.lengths, strict=True))
        ]
        return speculating(batch, self.case, num_drafts) if num_drafts else batch


SCENARIOS = {
    "adapters": Scenario(Case("llama", "near_draft", "greedy-rejection", 2, "base"), (18, 5), MIXED[1:], drafts=(2,)),
    "window": Scenario(Case("mistral", "random", "sampled-coupled", 2, "base"), (41, 1), budget=19, drafts=(2, 0)),
    "bias": Scenario(
        Case("qwen2", "near_draft", "sampled-rejection", 2, "base"),
        (3, 17),
        MIXED[1:2],
        drafts=(2,),
        behind=True,
    ),
    "fused": Scenario(
        Case("qwen3", "near_draft", "greedy-rejection", 2, "base"), (3, 5), MIXED[:2], drafts=(2,), fused=True
    ),
    # Two rows decode before a third comes, whose adapters are read meanwhile.
    "graphs": Scenario(
        Case("qwen3", "near_draft", "greedy-coupled", 2, "base"),
        (2, 3, 18),
        ((), *MIXED[::2]),
        drafts=(0, 2),
        graphs=True,
        num_new=4,
        behind=True,
    ),
}


class Again:
    """What a CUDA graph does, on a CPU: the same work on the same memory."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work = work
        self.replays = 0

    def replay(self) -> Tensor:
        self.replays += 1
        return self._work()


def capture_again(sets: Sequence[GraphSet], device: torch.device, *, with_adapters: bool, progress: bool) -> object:
    """`capture` of such graphs."""
    for one in sets:
        one.graphs.update((key, Again(work)) for key, work in one.works(with_adapters=with_adapters).items())  # type: ignore[misc]
    return {}


@pytest.fixture
def interpreted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """To be called once the reference has spoken: from then on Triton takes what lies on a CPU, if that is where its
    kernels are tested."""

    def begin() -> None:
        if device.type == "cpu":
            monkeypatch.setattr(dispatch, "TRITON_DEVICES", frozenset({"cpu"}))
            monkeypatch.setattr(lora_load, "_PROGRAMS", 1)  # each costs the interpreter milliseconds
            monkeypatch.setattr(step_graphs_module, "capture", capture_again)

    return begin


@pytest.mark.parametrize("name", SCENARIOS)
def test_triton_is_the_reference(
    name: str, device: torch.device, interpreted: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = SCENARIOS[name]
    monkeypatch.setattr(paged, "MOST_FUSED", 1000 if scenario.fused else 0)
    taken = mock.Mock(wraps=paged.qkv_attention)
    monkeypatch.setattr(attention_layer, "qkv_attention", taken)
    monkeypatch.setattr(storage, "MOST_BEHIND", 100 if scenario.behind else 0)
    monkeypatch.setattr(lora_grouped, "FEWEST_SPLIT", 1)
    split = mock.create_autospec(GroupedLora.split, side_effect=GroupedLora.split)
    monkeypatch.setattr(GroupedLora, "split", split)
    zoo = build_zoo(scenario.case.family, tmp_path)
    wanted = _answers(_engine(zoo, scenario, "cpu"), scenario)
    interpreted()
    llm = _engine(zoo, scenario, device.type)
    if scenario.graphs and device.type == "cpu":
        llm.engine.built.runner.capture_graphs(
            Sizes(MAX_NUM_SEQS, 24, 64), drafts=True, with_adapters=True, progress=False
        )
    answers = _answers(llm, scenario)
    if scenario.graphs and device.type == "cpu":
        _assert_replayed(llm)
    rtol, atol = MODEL[torch.float32]
    assert taken.called == scenario.fused
    assert split.called == scenario.behind
    for ours, reference in zip(answers, wanted, strict=True):
        assert ours.token_ids == reference.token_ids
        assert ours.cached_tokens == reference.cached_tokens
        values, expected = ([entry.logprob for entry in output.logprobs or ()] for output in (ours, reference))
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=rtol, atol=atol)


def test_trials_with_pretended_adapters_leave_nothing(
    device: torch.device, interpreted: Callable[[], None], tmp_path: Path
) -> None:
    scenario = replace(SCENARIOS["adapters"], lengths=(3,), num_new=4)
    zoo = build_zoo(scenario.case.family, tmp_path)
    wanted = _answers(_engine(zoo, scenario, "cpu"), scenario)
    interpreted()
    llm = _engine(zoo, scenario, device.type)
    llm.engine.measure_costs()
    llm.engine.built.runner.trial_step(2, 5, with_adapters=True)
    plain, dressed = (model.table for model in llm.engine.scheduler.policy.models.values())
    assert dressed is not plain, "steps with adapters were measured apart"
    assert not any(state.adapters.slot_ranks.any() for state in llm.engine.built.runner.states)
    for ours, reference in zip(_answers(llm, scenario), wanted, strict=True):
        assert ours.token_ids == reference.token_ids


def _assert_replayed(llm: LLM) -> None:
    """Steps that decode, that verify and that prefill were, and the draft's prefill and both of its passes."""
    graphs = llm.engine.built.runner.graphs
    assert graphs is not None and graphs.draft_prefill is not None
    sets = {
        "decode": graphs.decode, "verify": graphs.ragged[0], "mixed": graphs.ragged[1],
        "draft prefill": graphs.draft_prefill, "first pass": graphs.passes[2], "other passes": graphs.passes[1],
    }  # fmt: skip
    replayed = {name: {key[0] for key, graph in one.graphs.items() if graph.replays} for name, one in sets.items()}  # type: ignore[attr-defined]
    assert all(replayed.values()), replayed


def _engine(zoo: Zoo, scenario: Scenario, device: str) -> LLM:
    draft = "near" if scenario.case.proposer == "near_draft" and any(scenario.drafts) else None
    return open_engine(
        zoo, draft=draft, device=device, dtype="float32", pipeline_depth=scenario.case.depth, max_num_seqs=MAX_NUM_SEQS,
        max_model_len=64, num_blocks=40, max_num_batched_tokens=scenario.budget, max_loras=2, max_lora_rank=8,
        max_adapters_per_request=2, loras=tuple((name, str(zoo.adapters["near"][name])) for name in LOADED),
    )  # fmt: skip


def _answers(llm: LLM, scenario: Scenario) -> list[Output]:
    """Of all rounds; the engine is closed."""
    outputs = [output for num_drafts in scenario.drafts for output in run(llm, scenario.batch(num_drafts))]
    assert any(scenario.drafts) == any(output.speculation.drafted for output in outputs)
    llm.close()
    return outputs
