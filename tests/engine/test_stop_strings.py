"""With and without speculation a request ends at the same stop string, with the same text, tokens and probabilities,
though a round of drafts may bring the string, half of it, or tokens far beyond it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from specserve.core.messages import LoraRef
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams
from specserve.llm import LLM, Lora, Output

PROMPT = "def read_lines(path):\n"
LORAS: tuple[Lora, ...] = (None, "sql", LoraRef("docs", 0.5))
LENGTH = 24  # tokens without a stop string
PARTS = 5  # of the text, in each of which a stop string begins

Stop = tuple[str, ...]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(model="demo", device="cpu", dtype="float64", num_blocks=200, max_num_seqs=16, pipeline_depth=2)
    yield llm
    llm.close()


def answers(llm: LLM, stops: list[Stop], speculation: SpeculationParams, temperature: float) -> list[Output]:
    """As many stop strings for each adapter; every other request wants to see its own."""
    params = [
        SamplingParams(
            temperature=temperature, seed=4, max_tokens=LENGTH, ignore_eos=True, logprobs=0, speculation=speculation,
            stop=stop, include_stop_str_in_output=index % 2 == 1,
        )
        for index, stop in enumerate(stops)
    ]  # fmt: skip
    count = len(stops) // len(LORAS)
    return llm.generate([PROMPT] * len(stops), params, [lora for lora in LORAS for _ in range(count)])


def said(output: Output) -> tuple[object, ...]:
    entries = output.logprobs or []
    return output.text, output.token_ids, output.finish_reason, [entry.token_id for entry in entries]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_same_with_and_without_drafts(llm: LLM, temperature: float) -> None:
    texts = [output.text for output in answers(llm, [()] * len(LORAS), NO_SPECULATION, temperature)]
    starts = [(text, len(text) * part // PARTS + 1) for text in texts for part in range(PARTS)]
    stops: list[Stop] = [(text[at : at + 2 + at % 4], "\x00never") for text, at in starts]
    plain = answers(llm, stops, NO_SPECULATION, temperature)
    assert all(output.finish_reason == "stop" for output in plain)
    assert len({len(output.token_ids) for output in plain}) > 3
    for num_drafts, proposer in ((3, "draft_model"), (8, "ngram"), (5, "ngram+draft_model")):
        speculation = SpeculationParams(num_draft_tokens=num_drafts, proposer=proposer, method="coupled")
        found = answers(llm, stops, speculation, temperature)
        assert [said(output) for output in found] == [said(output) for output in plain]
        assert sum(output.speculation.accepted for output in found) > 0
