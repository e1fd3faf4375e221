"""Law: with and without speculation a request gets the same, whatever single field it sets: tokens, reason of its end,
log-probabilities. Greedy in either method, sampled in `coupled`. (Sampled `rejection`: test_distribution.py.)

The batches of the other laws mix the processors; here each field stands alone, at its edges too, and is shown to make a
difference. A field that is added to SamplingParams must be added here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest

from lawbook.cases import DEPTHS, MODES, PROPOSERS, Case, cases
from lawbook.engines import run
from lawbook.mixes import LORAS, Ask, prompt, speculating
from lawbook.zoo import EOS, VOCAB
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams
from specserve.llm import LLM, Output

NUM_NEW = 18
PER_VARIANT = 3  # requests, each with another prompt, adapter and number of drafts
STOPS = (6, 11, 16, 27, 29, 36, 40, 43, 50)
PAIRS = tuple((first, then) for first in range(VOCAB) if first not in STOPS for then in STOPS[:4])


class Variant(NamedTuple):
    """`fields` of a request, of which `field` is the one on trial."""

    field: str
    fields: Mapping[str, object]

    def without(self) -> Variant:
        return Variant(self.field, {name: value for name, value in self.fields.items() if name != self.field})


VARIANTS = (
    *(Variant("max_tokens", {"max_tokens": count}) for count in (1, 2, 4, 5, 6)),
    *(Variant("min_tokens", {"min_tokens": count, "stop_token_ids": STOPS}) for count in (5, 9)),
    Variant("min_tokens", {"min_tokens": 1, "stop_token_ids": STOPS, "logit_bias": {6: 5.0}}),
    Variant("stop_token_ids", {"stop_token_ids": STOPS}),
    Variant("ignore_eos", {"ignore_eos": True, "logit_bias": {EOS: 3.0}}),
    Variant("logit_bias", {"logit_bias": {5: 3.0, 17: -100.0}}),
    Variant("logit_bias", {"logit_bias": {9: 100.0}}),
    Variant("repetition_penalty", {"repetition_penalty": 1.4}),
    Variant("repetition_penalty", {"repetition_penalty": 0.7}),
    Variant("presence_penalty", {"presence_penalty": 1.5}),
    Variant("presence_penalty", {"presence_penalty": -1.0}),
    Variant("frequency_penalty", {"frequency_penalty": 1.1}),
    Variant("frequency_penalty", {"frequency_penalty": -0.5}),
    Variant("logprobs", {"logprobs": 0}),
    Variant("logprobs", {"logprobs": 5, "repetition_penalty": 1.2}),
    Variant("n", {"n": 3}),
    Variant("bad_words_token_ids", {"bad_words_token_ids": tuple((token,) for token in STOPS)}),
    # One token alone, but for every fourth; no token twice in a row; a few tokens only behind each other.
    Variant("bad_words_token_ids", {"bad_words_token_ids": ((9, 9, 9, 9), (9, 9, 8)), "logit_bias": {9: 100.0}}),
    Variant("bad_words_token_ids", {"bad_words_token_ids": tuple((token, token) for token in range(VOCAB))}),
    Variant("bad_words_token_ids", {"bad_words_token_ids": PAIRS}),
)
SAMPLED = (
    Variant("temperature", {"temperature": 0.5}),
    Variant("temperature", {"temperature": 1.5}),
    # Tokens that come again within a round, where penalties see the drafts before them.
    Variant("repetition_penalty", {"repetition_penalty": 1.8, "temperature": 0.2}),
    Variant("presence_penalty", {"presence_penalty": 2.0, "temperature": 0.2}),
    Variant("frequency_penalty", {"frequency_penalty": 2.0, "temperature": 0.2}),
    Variant("top_k", {"top_k": 1}),
    Variant("top_k", {"top_k": 6}),
    Variant("top_p", {"top_p": 0.6}),
    Variant("min_p", {"min_p": 0.3}),
    Variant("seed", {"seed": 77}),
    Variant("bad_words_token_ids", {"bad_words_token_ids": PAIRS, "temperature": 0.5, "min_tokens": 9}),
)
COVER = {
    ("near_draft", "greedy-rejection", 1),
    ("random", "greedy-coupled", 2),
    ("near_draft", "sampled-coupled", 1),
    ("ngram+near_draft", "sampled-coupled", 2),
}
# Text needs a tokenizer: tests/engine/test_stop_strings.py, test_bad_words.py.
ELSEWHERE = {"speculation", "stop", "include_stop_str_in_output", "bad_words"}


def asks(variants: tuple[Variant, ...], sampled: bool) -> list[Ask]:
    base = {"temperature": 1.0 if sampled else 0.0, "max_tokens": NUM_NEW, "speculation": NO_SPECULATION}
    loras = LORAS["distinct"]
    return [
        Ask(prompt(index), loras[index % len(loras)], SamplingParams(**({"seed": 500 + index} | base | variant.fields)))
        for index, variant in enumerate(variant for variant in variants for _ in range(PER_VARIANT))
    ]


def by_ask(batch: list[Ask], outputs: list[Output]) -> list[list[Output]]:
    """The answers of each request: n of them."""
    rest = iter(outputs)
    return [[next(rest) for _ in range(ask.params.n)] for ask in batch]


def said(output: Output) -> tuple[object, ...]:
    """What must be equal to the last bit; log-probabilities are sums over batches of another shape."""
    ranks = None if output.logprobs is None else [[token for token, _ in entry.top] for entry in output.logprobs]
    return output.token_ids, output.finish_reason, output.stop_token_id, ranks


def values(output: Output) -> list[float]:
    entries = output.logprobs or []
    return [value for entry in entries for value in (entry.logprob, *(value for _, value in entry.top))]


@cases(dict(proposer=PROPOSERS, mode=MODES, depth=DEPTHS), cover=COVER)
@pytest.mark.usefixtures("exact")
def test_each_field_alone(proposer: str, mode: str, depth: int, open_case: Callable[..., LLM]) -> None:
    case = Case("llama", proposer, mode, depth, "distinct")
    variants = VARIANTS + (SAMPLED if case.sampled else ())
    batch = asks(variants, case.sampled)
    plain = run(open_case(case, max_num_seqs=32), batch)
    answers = zip(batch, by_ask(batch, plain), strict=True)
    script = [ask.prompt + tuple(output.token_ids) for ask, outputs in answers for output in outputs]
    llm = open_case(case, script, max_num_seqs=32)
    drafting = speculating(batch, case)
    found = run(llm, drafting)
    if not any(output.speculation.drafted for output in found):
        found = run(llm, drafting)  # suffix: now it knows these texts
    assert [said(output) for output in found] == [said(output) for output in plain]
    for output, expected in zip(found, plain, strict=True):
        assert values(output) == pytest.approx(values(expected), abs=1e-9)
    assert sum(output.speculation.drafted for output in found) > len(batch)


@pytest.mark.parametrize("sampled", [False, True])
def test_each_field_makes_a_difference(sampled: bool, open_case: Callable[..., LLM]) -> None:
    variants = VARIANTS + (SAMPLED if sampled else ())
    llm = open_case(Case("llama", "ngram", "greedy-coupled", 2, "distinct"), max_num_seqs=32)
    having, lacking = asks(variants, sampled), asks(tuple(variant.without() for variant in variants), sampled)
    found, expected = (by_ask(batch, run(llm, batch)) for batch in (having, lacking))
    changed = [
        [said(output) for output in outputs] != [said(output) for output in others]
        for outputs, others in zip(found, expected, strict=True)
    ]
    without_effect = [
        variant for index, variant in enumerate(variants)
        if not any(changed[index * PER_VARIANT : (index + 1) * PER_VARIANT])
    ]  # fmt: skip
    assert without_effect == []


def test_every_field_is_tried() -> None:
    assert {variant.field for variant in VARIANTS + SAMPLED} | ELSEWHERE == set(SamplingParams.__struct_fields__)
