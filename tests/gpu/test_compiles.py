"""Nobody waits while a kernel is compiled: once an engine has opened, requests of each kind compile none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.llm import LLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KINDS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=0.8),
    "temperature of 1": replace(GREEDY, temperature=1.0),
    "top_p": replace(GREEDY, temperature=0.8, top_p=0.95),
    "top_k": replace(GREEDY, temperature=0.8, top_k=20),
    "all cuts": replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": replace(GREEDY, temperature=0.5, frequency_penalty=0.3),
    "penalties and top_p": replace(GREEDY, temperature=0.5, top_p=0.9, repetition_penalty=1.1),
    "greedy penalties": replace(GREEDY, presence_penalty=0.5),
    "bad words": replace(GREEDY, temperature=0.8, bad_words_token_ids=((5, 6, 7), (8,)), logit_bias={9: 1.0}),
    "logprobs": replace(GREEDY, temperature=0.8, logprobs=2),
}
SIZES = (1, 9, 128)
LORAS = (None, "sql", "docs")


@pytest.fixture(scope="module")
def opened() -> Iterator[LLM]:
    llm = LLM(model="demo", device="cuda", dtype="bfloat16", num_blocks=4000, max_num_seqs=128)
    llm.engine.measure_costs()  # as a server does when it starts
    llm.generate([[5, 6, 7]] * len(LORAS), GREEDY, list(LORAS))  # adapters are read
    yield llm
    llm.close()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, or read from Triton's cache on disk, since the test began."""
    knobs = pytest.importorskip("triton.knobs")
    seen: list[str] = []

    def note(*, repr: str, fn: Any, **_: Any) -> None:
        seen.append(f"{fn.module}.{repr}")

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    return seen


@pytest.mark.parametrize("method", ["rejection", "coupled"])
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3, None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_compiles_nothing(
    opened: LLM, compiled: list[str], kind: str, num_drafts: int | None, method: Any
) -> None:
    asked = replace(KINDS[kind], speculation=SpeculationParams(num_draft_tokens=num_drafts, method=method))
    for size in SIZES:
        run(opened, [asked] * size)
    assert not compiled


@pytest.mark.parametrize("seed", range(8))
def test_a_mix_compiles_nothing(opened: LLM, compiled: list[str], seed: int) -> None:
    draw = random.Random(seed)

    def asked() -> SamplingParams:
        proposer, num_drafts = draw.choice((None, "ngram", "draft_model")), draw.choice((0, 2, 3, None))
        speculation = SpeculationParams(
            num_draft_tokens=num_drafts, method=draw.choice(("rejection", "coupled")), proposer=proposer
        )
        return replace(draw.choice(list(KINDS.values())), speculation=speculation)

    for size in SIZES[1:]:
        run(opened, [asked() for _ in range(size)])
    assert not compiled


def run(llm: LLM, params: list[SamplingParams]) -> None:
    prompts = [[3 + (7 * i + j) % 900 for j in range((3, 17, 90)[i % 3])] for i in range(len(params))]
    outputs = llm.generate(prompts, params, [LORAS[i % len(LORAS)] for i in range(len(params))])
    assert all(len(output.token_ids) == GREEDY.max_tokens for output in outputs)
