"""bad_words as a user gives them, text: a request gets the same without drafts and with any number of them, and none of
the words' token sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from specserve.core.errors import InvalidRequestError
from specserve.core.messages import AddRequest, LoraRef
from specserve.core.sampling_params import NO_SPECULATION, Method, SamplingParams, SpeculationParams
from specserve.llm import LLM, Lora, Output

PROMPT = "def read_lines(path):\n"
LORAS: tuple[Lora, ...] = (None, "sql", LoraRef("docs", 0.5))
WORDS = ("the file", "is read from the", "query", "Parameters", "ParameterName", ":", ",", "  =")  # of 1 to 4 tokens
LENGTH = 24


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(model="demo", device="cpu", dtype="float64", num_blocks=200, max_num_seqs=27, pipeline_depth=2)
    yield llm
    llm.close()


def answers(llm: LLM, temperature: float, *speculations: SpeculationParams, **fields: object) -> list[Output]:
    """For each adapter, with each kind of drafting, all in one batch."""
    params = [
        SamplingParams(temperature=temperature, seed=4, max_tokens=LENGTH, ignore_eos=True, speculation=one, **fields)
        for one in speculations for _ in LORAS
    ]  # fmt: skip
    return llm.generate([PROMPT] * len(params), params, list(LORAS) * len(speculations))


def contained(llm: LLM, output: Output, words: Sequence[str]) -> list[str]:
    """Which words' tokens, with or without a space before them, stand in an answer."""
    text = output.token_ids
    found = []
    for word in words:
        for form in (word.lstrip(), " " + word.lstrip()):
            tokens = llm.tokenizer.encode(form, add_special_tokens=False)
            if any(text[at : at + len(tokens)] == tokens for at in range(len(text))):
                found.append(form)
    return found


def said(outputs: list[Output]) -> list[tuple[str, list[int]]]:
    return [(output.text, output.token_ids) for output in outputs]


@pytest.mark.parametrize(("temperature", "method"), [(0.0, "rejection"), (0.0, "coupled"), (0.9, "coupled")])
def test_same_for_every_number_of_drafts(llm: LLM, temperature: float, method: Method) -> None:
    free = answers(llm, temperature, NO_SPECULATION)
    assert all(contained(llm, output, WORDS) for output in free)
    plain = answers(llm, temperature, NO_SPECULATION, bad_words=WORDS)
    assert not any(contained(llm, output, WORDS) for output in plain)
    proposers = ("draft_model", "ngram", "ngram+draft_model", "suffix")
    every = [
        SpeculationParams(num_draft_tokens=count, proposer=proposers[count % 4], method=method) for count in range(9)
    ]
    found = answers(llm, temperature, *every, bad_words=WORDS)
    assert said(found) == said(plain) * len(every)
    assert sum(output.speculation.accepted for output in found) > 50


def test_rejection_never_says_them(llm: LLM) -> None:
    kinds = [
        SpeculationParams(num_draft_tokens=count, proposer=proposer, method="rejection")
        for count, proposer in ((3, "draft_model"), (8, "ngram"), (2, "ngram+draft_model"))
    ]
    free, found = answers(llm, 0.8, *kinds), answers(llm, 0.8, *kinds, bad_words=WORDS)
    assert sum(bool(contained(llm, output, WORDS)) for output in free) > len(free) / 2
    assert not any(contained(llm, output, WORDS) for output in found)
    assert sum(output.speculation.accepted for output in found) > 0


@pytest.mark.parametrize("num_drafts", [0, 4])
def test_a_word_that_begins_in_the_prompt_is_not_seen(llm: LLM, num_drafts: int) -> None:
    """What a request is resumed from was generated, though, and is."""
    speculation = SpeculationParams(num_draft_tokens=num_drafts, proposer="draft_model")
    prompt = llm.tokenizer.encode(PROMPT)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, speculation=speculation)

    def generate(prompt_ids: list[int], output_ids: list[int], words: tuple[tuple[int, ...], ...]) -> list[int]:
        given = SamplingParams(
            temperature=0.0, max_tokens=8, ignore_eos=True, speculation=speculation, bad_words_token_ids=words
        )
        llm.engine.add_request(
            AddRequest(request_id="r", prompt_ids=prompt_ids, output_ids=output_ids, params=given, seed=0)
        )
        outputs = []
        while llm.engine.has_work():
            outputs += llm.engine.step()
        return [token for output in outputs for token in output.token_ids]

    (free,) = llm.generate([prompt], params)
    first, second, third, *_ = free.token_ids
    assert generate(prompt, [], ((prompt[-1], first),)) == free.token_ids
    assert generate([*prompt, first], [], ((prompt[-1], first, second), (first, second)))[:2] == [second, third]
    whole = generate(prompt, [], ((first, second),))
    assert whole[0] == first and whole[1] != second
    assert generate(prompt, [first], ((first, second),)) == whole[1:]


@pytest.mark.parametrize("words", ["query", [""], ["a", " "], [5], ["x"] * 129, ["lorem ipsum " * 40], None])
def test_refused_by_name(llm: LLM, words: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        answers(llm, 0.0, NO_SPECULATION, bad_words=words)
    assert caught.value.param == "bad_words"
    assert len(caught.value.message) < 200
    assert not llm.engine.has_work()


@pytest.mark.parametrize("sequences", [((),), ((5,) * 33,), ((5,),) * 257, ((5, 4096),), ((-1,),)])
def test_sequences_are_refused_by_name(llm: LLM, sequences: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        answers(llm, 0.0, NO_SPECULATION, bad_words_token_ids=sequences)
    assert caught.value.param == "bad_words_token_ids"


def test_the_engine_takes_tokens_alone(llm: LLM) -> None:
    request = AddRequest(request_id="r", prompt_ids=[5], params=SamplingParams(bad_words=("x",)), seed=0)
    with pytest.raises(InvalidRequestError, match="bad_words_token_ids") as caught:
        llm.engine.add_request(request)
    assert caught.value.param == "bad_words"
