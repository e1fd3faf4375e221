"""Requests: who asks what of which adapters. The same for every law, so that each law is held against one truth."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from msgspec.structs import replace as with_fields

from lawbook.cases import Case
from lawbook.zoo import ADAPTERS, VOCAB
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams

NUM_REQUESTS = 7
NUM_NEW = 20
DRAFTS_PER_STEP = (4, 1, 3, 0, 2, 4, 5)
Lora = tuple[LoraRef, ...]
# Four tokens that must not follow each token, and a longer sequence.
WORDS = (*((token, (5 * token + shift) % VOCAB) for token in range(VOCAB) for shift in range(4)), (15, 48, 44, 15))

# One request each, cyclically: every processor occurs in every batch, beside requests without any.
GREEDY: tuple[dict[str, object], ...] = (
    {},
    {"repetition_penalty": 1.4},
    {"ignore_eos": True},
    {"presence_penalty": 0.8, "frequency_penalty": 0.6},
    {"logit_bias": {5: 3.0, 17: -100.0}},
    {"min_tokens": 9, "stop_token_ids": (11, 16, 27, 36, 40)},
    {"bad_words_token_ids": WORDS},
)
SAMPLED: tuple[dict[str, object], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 9},
    {"temperature": 1.3, "top_p": 0.8, "bad_words_token_ids": WORDS},
    {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.7, "logit_bias": {8: 2.0}},
    {"temperature": 0.7, "min_tokens": 12, "stop_token_ids": (6, 29, 43, 50)},
    {"temperature": 0.0},
)


@dataclass(frozen=True)
class Ask:
    """One request, without its place in a batch."""

    prompt: tuple[int, ...]
    lora: Lora
    params: SamplingParams


def _lora(*refs: str | tuple[str, float]) -> Lora:
    return tuple(LoraRef(ref) if isinstance(ref, str) else LoraRef(*ref) for ref in refs)


def _zipf() -> list[Lora]:
    """Popularity falls as 1/rank (as in punica's workloads); the base is the most popular."""
    names: list[Lora] = [(), *(_lora(name) for name in ADAPTERS)]
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    return random.Random(4).choices(names, weights, k=NUM_REQUESTS)


LORAS: dict[str, list[Lora]] = {
    "base": [()],
    "identical": [_lora("a1")],
    "distinct": [(), *(_lora(name) for name in ADAPTERS)],
    "zipf": _zipf(),
    "overflow": [_lora(name) for name in ("a0", "a5", "a1", "a4", "a2", "a3", "a0")],
    "summed": [_lora("a0", "a1"), _lora("a1", "a2", "a4"), (), _lora("a3"), _lora("a0", "a1", "a2", "a3")],
    "scaled": [
        _lora(("a1", 0.5)),
        _lora(("a0", -1.0)),
        _lora(("a2", 1.5), ("a3", 0.25)),
        _lora("a1"),
        _lora(("a3", 0.0)),
    ],
}
# `overflow` has six adapters for two slots; a request of `summed` needs up to four at once.
SLOTS = {"overflow": 2}


def prompt(index: int, length: int | None = None) -> tuple[int, ...]:
    """Distinct for each index; every other one repeats itself, so that n-grams are found."""
    draw = random.Random(1000 + index)
    tokens = [draw.randrange(3, VOCAB) for _ in range(length or draw.randrange(3, 40))]
    if index % 2:
        tokens = (tokens[:7] * (len(tokens) // 7 + 1))[: len(tokens)]
    return tuple(tokens)


def asks(
    mix: str, *, sampled: bool, length: int | None = None, num_new: int = NUM_NEW, count: int = NUM_REQUESTS
) -> list[Ask]:
    """The batch of a mix: `count` requests, each with a seed, none speculating."""
    variants, loras = SAMPLED if sampled else GREEDY, LORAS[mix]
    batch = []
    for index in range(count):
        fields = {"temperature": 0.0} | variants[index % len(variants)]
        params = SamplingParams(seed=900 + index, max_tokens=num_new, speculation=NO_SPECULATION, **fields)
        batch.append(Ask(prompt(index, length), loras[index % len(loras)], params))
    return batch


def proposer_name(proposer: str) -> str:
    """The engine's name of a case's proposer: draft models differ by their weights alone."""
    return "+".join("draft_model" if part.endswith("_draft") else part for part in proposer.split("+"))


def speculating(batch: list[Ask], case: Case, num_drafts: int | None = None) -> list[Ask]:
    """The same requests with the case's proposer and method, each with its own number of drafts unless told."""
    proposer = proposer_name(case.proposer)
    result = []
    for index, ask in enumerate(batch):
        count = DRAFTS_PER_STEP[index % len(DRAFTS_PER_STEP)] if num_drafts is None else num_drafts
        speculation = SpeculationParams(num_draft_tokens=count, method=case.method, proposer=proposer)
        result.append(replace(ask, params=with_fields(ask.params, speculation=speculation)))
    return result
