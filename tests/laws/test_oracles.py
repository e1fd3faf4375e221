"""Law: tokens and log-probabilities are transformers', and peft's where there are adapters, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from msgspec.structs import replace as with_fields

from lawbook.cases import FAMILIES, MIXES, Case, over
from lawbook.engines import run
from lawbook.mixes import Ask, asks, speculating
from lawbook.oracles import logits_of, peft_model
from lawbook.zoo import Zoo
from specserve.core.sampling_params import SamplingParams
from specserve.llm import LLM, Output

NEAR_TIE = 1e-5  # a mismatch is exempt where the oracle's best two logits are closer than this
EXEMPTIONS = 0  # on these seeds
TOLERANCE = 2e-4  # of log-probabilities: float32 over two layers, summed in another order


def pure_greedy(ask: Ask) -> Ask:
    params = SamplingParams(temperature=0.0, seed=ask.params.seed, max_tokens=24, ignore_eos=True, logprobs=5)
    return replace(ask, params=params)


def compare(zoo: Zoo, ask: Ask, output: Output) -> int:
    """Hold one answer against the oracle, token by token given what came before; returns how many are exempt."""
    logits = logits_of(peft_model(zoo, ask.lora, torch.float32), ask.prompt, tuple(output.token_ids))  # [N, vocab]
    best = logits.topk(2, dim=-1).values  # [N, 2]
    wrong = logits.argmax(-1) != torch.tensor(output.token_ids)  # [N]
    exempt = wrong & (best[:, 0] - best[:, 1] < NEAR_TIE)
    assert not (wrong & ~exempt).any(), f"{output.token_ids} differs at {wrong.nonzero().flatten().tolist()}"
    assert output.logprobs is not None
    expected = logits.log_softmax(-1)
    for row, entry in zip(expected, output.logprobs, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=TOLERANCE)
        assert len(entry.top) == 5
        for token, value in entry.top:
            assert value == pytest.approx(row[token].item(), abs=TOLERANCE)
    return int(exempt.sum())


@over(family=FAMILIES, mix=MIXES, method=("rejection", "coupled"))
def test_transformers_and_peft_agree(
    family: str, mix: str, method: str, zoo: Callable[[str], Zoo], open_case: Callable[..., LLM]
) -> None:
    case = Case(family, "near_draft", f"greedy-{method}", 2, mix)
    batch = [pure_greedy(ask) for ask in asks(mix, sampled=False)]
    drafting = speculating(batch, case)
    outputs = run(open_case(case, dtype="float32", max_num_batched_tokens=50), drafting)
    assert all(len(output.token_ids) == 24 for output in outputs)
    exempt = sum(compare(zoo(family), ask, output) for ask, output in zip(batch, outputs, strict=True))
    assert exempt == EXEMPTIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_generate_agrees(family: str, zoo: Callable[[str], Zoo], open_case: Callable[..., LLM]) -> None:
    """Against `generate` itself, with its own cache and stopping at its own end-of-text."""
    batch = [
        replace(ask, params=with_fields(pure_greedy(ask).params, ignore_eos=False, logprobs=None, max_tokens=40))
        for ask in asks("distinct", sampled=False)
    ]
    outputs = run(open_case(Case(family, "ngram", "greedy-coupled", 1, "distinct"), dtype="float32"), batch)
    for ask, output in zip(batch, outputs, strict=True):
        model = peft_model(zoo(family), ask.lora, torch.float32)
        text = model.generate(input_ids=torch.tensor([ask.prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)
        expected = text[0, len(ask.prompt) :].tolist()
        if output.stop_token_id is not None:
            assert expected[-1] == output.stop_token_id
            expected.pop()
        assert output.token_ids == expected
