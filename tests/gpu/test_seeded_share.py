"""How many seeded answers are the very same with and without speculation where numbers are rounded.

In exact arithmetic all are (tests/laws/test_coupled.py). On a GPU a verification may sum in another order than a
decode. Then the gap between a position's two best choices is off by some δ, and where the gap is smaller another
token is chosen. With Gumbel noise the gap is below a small δ with probability δ · (1 − Σ p²) / T (p: the distribution
sampled from, T its temperature). Between two tokens mean |δ| · (1 − Σ p²) is just e, the mean difference of the log-
probability of the token that is drawn, which is measured here where both runs chose it after the same text. So an
answer of L tokens stays the same with probability exp(−L · e / T); the floor is that of twice the error. A share
below it has another cause than rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM, Output

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["def read_lines(path):\n", "SELECT name, count(*) FROM", "function map(list, f) {", "Return the number of"]
LORAS = [None, "sql", "javascript", "docs"]
SEEDS = 32
LENGTH = 64
TEMPERATURE = 0.8
# In float32 the bundled models' log-probabilities err by some 1e-5, so one answer in a thousand parts; of bfloat16
# nothing is known beforehand.
LEAST = {"float32": 0.95, "bfloat16": 0.0}
SPECULATION = {
    "draft_model": SpeculationParams(num_draft_tokens=4, proposer="draft_model", method="coupled"),
    "ngram": SpeculationParams(num_draft_tokens=4, proposer="ngram", method="coupled"),
    "mixed": SpeculationParams(num_draft_tokens=7, proposer="ngram+draft_model", method="coupled"),
}


class Agreement(NamedTuple):
    """`share` of answers that are equal; `error`: mean difference of log-probabilities after the same text; `accepted`
    drafts."""

    share: float
    error: float
    accepted: int

    def floor(self, answers: int) -> float:
        """Less four standard deviations of a share among so many answers."""
        expected = math.exp(-LENGTH * 2 * self.error / TEMPERATURE)
        return expected - 4 * math.sqrt(expected * (1 - expected) / answers) - 1 / answers


def answers(llm: LLM, speculation: SpeculationParams) -> list[Output]:
    params = [
        SamplingParams(
            temperature=TEMPERATURE, seed=seed, max_tokens=LENGTH, ignore_eos=True, logprobs=0, speculation=speculation
        )
        for seed in range(SEEDS)
    ]
    count = len(PROMPTS) * SEEDS
    kinds = [index % len(PROMPTS) for index in range(count)]
    return llm.generate(
        [PROMPTS[kind] for kind in kinds], [params[index // len(PROMPTS)] for index in range(count)],
        [LORAS[kind] for kind in kinds],
    )  # fmt: skip


def agreement(plain: list[Output], found: list[Output]) -> Agreement:
    same, errors = 0, []
    for one, other in zip(plain, found, strict=True):
        same += one.token_ids == other.token_ids
        for expected, entry in zip(one.logprobs or [], other.logprobs or [], strict=True):
            if expected.token_id != entry.token_id:
                break  # what follows is another text
            errors.append(abs(expected.logprob - entry.logprob))
    accepted = sum(output.speculation.accepted for output in found)
    return Agreement(same / len(plain), sum(errors) / len(errors), accepted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_share_of_equal_answers(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(model="demo", device="cuda", dtype=dtype, num_blocks=2000, max_num_seqs=64)
    plain = answers(llm, NO_SPECULATION)
    for name, speculation in SPECULATION.items():
        found = agreement(plain, answers(llm, speculation))
        floor = max(found.floor(len(plain)), LEAST[dtype])
        with capsys.disabled():
            print(f"\n{dtype} {name}: {found.share:.1%} of {len(plain)} answers equal", end=", ")
            print(f"error {found.error:.1e}, floor {floor:.1%}")
        assert found.accepted > len(plain)
        assert found.share >= floor
    llm.close()
