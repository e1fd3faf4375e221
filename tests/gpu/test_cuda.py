"""The same engine on a CUDA device, with the bundled models: in float64 every token equals the CPU's, whatever is
switched on; in bfloat16 and float32 it runs and its speculation accepts as it does on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from specserve.core.messages import LoraRef
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.llm import LLM, Output

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["def read_lines(path):\n", "SELECT name, count(*) FROM", "function map(list, f) {", "Return the number of"]
LORAS = [None, "sql", "javascript", [LoraRef("docs", 0.5), LoraRef("sql", 0.7)]]


@dataclass(frozen=True)
class Ask:
    """One way to ask for the same tokens."""

    num_drafts: int = 0
    proposer: str | None = None
    temperature: float = 0.0

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_p=0.9 if self.temperature else 1.0,
            seed=11,
            max_tokens=48,
            ignore_eos=True,
            frequency_penalty=0.1 if self.temperature else 0.0,
            speculation=SpeculationParams(num_draft_tokens=self.num_drafts, proposer=self.proposer),
        )


def answers(llm: LLM, ask: Ask) -> list[Output]:
    return llm.generate(PROMPTS, ask.params, LORAS)


@pytest.fixture(scope="module")
def on_cpu() -> LLM:
    return LLM(model="demo", device="cpu", dtype="float64")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_equal_the_cpus_in_float64(on_cpu: LLM, depth: int, temperature: float) -> None:
    llm = LLM(
        model="demo", device="cuda", dtype="float64", pipeline_depth=depth, num_blocks=400, check_integrity=True,
        max_loras=2 if depth == 1 else 8, max_num_seqs=16, max_num_batched_tokens=64,
    )  # fmt: skip
    truth = [output.token_ids for output in answers(on_cpu, Ask(temperature=temperature))]
    for ask in (
        Ask(temperature=temperature),
        Ask(4, "draft_model", temperature),
        Ask(3, "ngram", temperature),
    ):
        assert [output.token_ids for output in answers(llm, ask)] == truth, ask
    alone = [
        llm.generate([p], Ask(2, None, temperature).params, [ref])[0] for p, ref in zip(PROMPTS, LORAS, strict=True)
    ]
    assert [output.token_ids for output in alone] == truth
    llm.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_runs_and_accepts_drafts(on_cpu: LLM, dtype: str) -> None:
    llm = LLM(model="demo", device="cuda", dtype=dtype, num_blocks=400)
    ask = Ask(4, "draft_model")

    def rate(outputs: list[Output]) -> float:
        return sum(o.speculation.accepted for o in outputs) / sum(o.speculation.drafted for o in outputs)

    assert abs(rate(answers(llm, ask)) - rate(answers(on_cpu, ask))) < 0.15
    llm.close()


def test_float32_logprobs_equal_the_cpus(on_cpu: LLM) -> None:
    llm = LLM(model="demo", device="cuda", dtype="float32", num_blocks=400)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    for mine, truth in zip(llm.generate(PROMPTS, params, LORAS), on_cpu.generate(PROMPTS, params, LORAS), strict=True):
        assert mine.logprobs is not None and truth.logprobs is not None
        for (token, value), (want_token, want) in zip(mine.logprobs[0].top, truth.logprobs[0].top, strict=True):
            assert token == want_token
            assert value == pytest.approx(want, abs=2e-4)
    llm.close()
