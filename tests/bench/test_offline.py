"""What an engine in this process answered, as records."""

from __future__ import annotations

import pytest

from specserve.bench.offline import generate
from specserve.bench.records import TracedRequest
from specserve.core.errors import InvalidRequestError
from specserve.core.messages import SpeculationStats
from specserve.core.sampling_params import SamplingParams
from specserve.llm import Output


class Echo:
    """Each choice has as many tokens as its prompt, and one accepted draft for each choice before it too."""

    def generate(
        self, prompts: list[str | list[int]], params: list[SamplingParams], lora: list[str | None]
    ) -> list[Output]:
        return [
            Output("", list(range(len(prompt))), f"{prompt}{index}", "length", speculation=_stats(index))
            for prompt, one in zip(prompts, params, strict=True)
            for index in range(one.n)
        ]


def _stats(accepted: int) -> SpeculationStats:
    return SpeculationStats(drafted_per_position=[4] * (accepted + 1), accepted_per_position=[1] * accepted)


def test_all_choices_of_a_request_are_its_records() -> None:
    trace = [TracedRequest(0, 0.0, "abc", 3, 8, "sql", {"n": 2}), TracedRequest(1, 0.0, "de", 2, 8)]
    run = generate(Echo(), trace)
    assert [(one.index, one.adapter, one.output_tokens, one.text) for one in run.requests] == [
        (0, "sql", 6, "abc0\nabc1"), (1, None, 2, "de0"),
    ]  # fmt: skip
    assert (run.requests[0].drafted_per_position, run.requests[0].accepted_per_position) == ([8, 4], [1])
    assert {one.end for one in run.requests} == {run.duration}


def test_fields_are_read_as_the_server_reads_them() -> None:
    with pytest.raises(InvalidRequestError, match="extra-body"):
        generate(Echo(), [TracedRequest(0, 0.0, "a", 1, 8, fields={"n": "two"})])
