"""What each request gives alone, and whether what a busy engine gave instead may be excused as rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lawbook.engines import HERE, open_engine, requests, run, run_steps
from lawbook.mixes import Ask
from lawbook.zoo import Zoo
from specserve.llm import LLM
from specserve.runtime import runner
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.sample import sample

Tokens = tuple[int, ...]

NEAR_TIE = 1e-3  # of two logits; float32 over two layers errs by a hundredth of it
TRIALS = 40  # each finds a near tie of two tokens with probability 1/4
MAX_EXCUSED = 0.02  # of the requests compared


@dataclass
class Plain:
    """What each request gives alone, in whole prefill, one step after another, without drafts or a prefix cache: in
    float64 on the CPU, wherever the busy engines run."""

    zoo: Callable[[str], Zoo]
    engines: dict[str, LLM] = field(default_factory=dict)
    known: dict[tuple[str, str], Tokens] = field(default_factory=dict)
    compared: int = 0  # requests, where not every token is promised
    excused: int = 0

    def answers(self, family: str, batch: list[Ask]) -> list[Tokens]:
        return [self._answer(family, ask) for ask in batch]

    def judged(self, family: str, batch: list[Ask], answers: list[Tokens], truth: list[Tokens]) -> list[Tokens]:
        """`answers` to be held against `truth`; where the dtype rounds, those are replaced by it that part from it at a
        near tie. What comes after is another text."""
        if HERE.exact:
            return answers
        return [
            expected if self._is_excused(family, ask, answer, expected) else answer
            for ask, answer, expected in zip(batch, answers, truth, strict=True)
        ]

    def _is_excused(self, family: str, ask: Ask, answer: Tokens, expected: Tokens) -> bool:
        self.compared += 1
        if answer == expected:
            return False
        pairs = zip(answer, expected, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(expected)))
        excused = self._is_near_tie(family, ask, expected[:same])
        self.excused += excused
        return excused

    def _is_near_tie(self, family: str, ask: Ask, before: Tokens) -> bool:
        """Whether the choice after `before` would be another one, had each logit been off by half of NEAR_TIE."""
        found: list[bool] = []

        def spy(logits: Tensor, batch: SamplingBatch, positions: Tensor) -> Tensor:
            chosen = sample(logits, batch, positions)
            if not found:
                others = [sample(other, batch, positions) for other in perturbed(logits)]
                found.append(any(not torch.equal(other, chosen) for other in others))
            return chosen

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "sample", spy)
            run_steps(self._engine(family), requests([ask], [before]))
        return found[0]

    def _engine(self, family: str) -> LLM:
        if family not in self.engines:
            self.engines[family] = open_engine(
                self.zoo(family), device="cpu", dtype="float64", enable_prefix_caching=False, pipeline_depth=1
            )
        return self.engines[family]

    def _answer(self, family: str, ask: Ask) -> Tokens:
        key = (family, repr(ask))
        if key not in self.known:
            self.known[key] = tuple(run(self._engine(family), [ask])[0].token_ids)
        return self.known[key]


def perturbed(logits: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (TRIALS, *logits.shape), generator=generator) * 2 - 1
    return list(logits + signs.to(logits.dtype) * (NEAR_TIE / 2))
