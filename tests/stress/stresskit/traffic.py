"""Requests: what is asked in a round, what came back, and what it must be."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from lawbook.zoo import VOCAB
from specserve.core.messages import AddRequest, LoraRef, RequestOutput
from specserve.core.sampling_params import SamplingParams, SpeculationParams
from stresskit.contents import BROKEN
from stresskit.ledger import Ledger, Meaning
from stresskit.truth import Answer, combine

MAX_SUM = 4
SCALES = (1.0, 1.0, 1.0, 0.5, -0.5, 1.5)
PREFIXES = tuple(tuple((7 * j + 11 * i) % (VOCAB - 5) + 4 for j in range(14)) for i in range(4))
DRAWN: tuple[dict[str, object], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 9},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 0.9, "repetition_penalty": 1.3},
)


@dataclass
class Asked:
    """A request under way. `lives`: the names it counts for, each with the number of its life."""

    request: AddRequest
    meanings: tuple[Meaning, ...]
    lives: frozenset[tuple[str, int]]
    may_mean: tuple[frozenset[str], ...] = ()  # as of its first word
    tokens: list[int] = field(default_factory=list)
    begun: bool = False

    def hear(self, output: RequestOutput, ledger: Ledger) -> Answer | None:
        """Take in what it said; the answer, if that was all of it and it did not fail as it had to."""
        if not self.begun:
            self.begun = True
            self.may_mean = tuple(ledger.resolve(meaning) for meaning in self.meanings)
        self.tokens += output.token_ids
        if output.finish_reason is None:
            return None
        if output.error is not None:
            assert output.error.code == "invalid_adapter" and not self.tokens, output
            assert any(BROKEN in may for may in self.may_mean), f"{output.error}, but {self.may_mean}"
            return None
        good = [may - {BROKEN} for may in self.may_mean]
        assert all(good), f"{self.request} was answered, but its adapter is broken"
        limit = self.request.params.max_tokens
        assert (output.finish_reason, output.stop_token_id) == ("length", None) or output.finish_reason == "stop"
        assert (len(self.tokens) == limit) == (output.finish_reason == "length") or len(self.tokens) < (limit or 0)
        loras = combine(good, [ref.scale for ref in self.request.lora])
        return Answer(self.request, loras, tuple(self.tokens), output.stop_token_id)


def draw_prompt(rng: random.Random) -> list[int]:
    """A few beginnings, cut anywhere, with a tail of its own now and then: much for the prefix cache to confuse."""
    prefix = rng.choice(PREFIXES)
    return [*prefix[: rng.randint(2, len(prefix))], *(rng.randint(40, 43) for _ in range(rng.choice((0, 0, 1, 3))))]


def draw_params(rng: random.Random) -> SamplingParams:
    """Greedy under any method, or drawn with the promise of the target's own sample."""
    greedy = rng.random() < 0.75
    speculation = SpeculationParams(
        num_draft_tokens=rng.choice((0, 1, 3, 4)),
        method=rng.choice(("rejection", "coupled")) if greedy else "coupled",
        proposer=rng.choice(("draft_model", "draft_model", "ngram", "random")),
    )
    drawn = {"temperature": 0.0} if greedy else rng.choice(DRAWN)
    return SamplingParams(
        seed=rng.randint(0, 3), max_tokens=rng.randint(1, 16), ignore_eos=rng.random() < 0.5, speculation=speculation,
        **drawn,
    )  # fmt: skip


def draw_lora(rng: random.Random, names: list[str]) -> tuple[LoraRef, ...]:
    """The base, one adapter, or a sum, in which a name may occur twice; popularity falls as 1/rank."""
    count = rng.choice((0, 1, 1, 1, 1, 2, 2, 3, MAX_SUM))
    chosen = rng.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)
    return tuple(LoraRef(name, rng.choice(SCALES)) for name in chosen)
