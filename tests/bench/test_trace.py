"""Traces: the same for the same options, and distributed as they say."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from specserve.bench.options import TraceOptions
from specserve.bench.trace import as_text, make_trace, read_trace, write_trace
from specserve.bench.vocabulary import Vocabulary
from specserve.core.errors import InvalidRequestError


class Words:
    """A tokenizer of one word a token; counts how often it was loaded."""

    ids: ClassVar = list(range(10, 500))
    loaded = 0

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    @classmethod
    def load(cls) -> Words:
        cls.loaded += 1
        return cls()


def trace(**options: Any) -> list[Any]:
    return make_trace(TraceOptions(**options), Words)


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def gaps(**options: Any) -> list[float]:
    return [b.arrival - a.arrival for a, b in pairwise(trace(input_len=1, **options))]


def test_a_seed_gives_the_same_bytes_on_every_machine() -> None:
    made = trace(
        num_prompts=50, seed=7, request_rate=3.0, burstiness=0.5, random_range_ratio=0.5, random_prefix_len=2,
        lora_modules=("a", "b", "c"), lora_assignment="zipf", seeded=True, temperature=0.0,
    )  # fmt: skip
    digest = hashlib.sha256(msgspec.json.Encoder().encode_lines(made)).hexdigest()
    assert digest[:16] == "79002a5ffc8fcb78"


def test_what_is_not_changed_stays_when_something_else_is() -> None:
    first, other = trace(seed=1), trace(seed=1, request_rate=2.0, lora_modules=("a",))
    assert [request.prompt for request in first] == [request.prompt for request in other]
    assert [request.prompt for request in first] != [request.prompt for request in trace(seed=2)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_the_gaps_have_the_mean_and_the_shape_asked_for(burstiness: float) -> None:
    count, rate = 20_000, 8.0
    found = gaps(num_prompts=count, request_rate=rate, burstiness=burstiness)
    assert statistics.mean(found) == pytest.approx(1 / rate, rel=1e-3)  # stretched to fit
    # A gamma distribution's coefficient of variation is 1/√shape; its standard error at this count is below 3 %.
    assert statistics.stdev(found) / statistics.mean(found) == pytest.approx(burstiness**-0.5, rel=0.08)
    # And its mean logarithm digamma(shape) - ln(shape) tells it from others of the same variance.
    scipy_special = pytest.importorskip("scipy.special")
    logs = [math.log(max(gap, 1e-9) * rate) for gap in found]
    expected = float(scipy_special.digamma(burstiness)) - math.log(burstiness)
    assert statistics.mean(logs) == pytest.approx(expected, abs=5 * statistics.stdev(logs) / math.sqrt(count))


def test_no_burstiness_is_a_clock() -> None:
    assert gaps(num_prompts=20, request_rate=4.0, burstiness=math.inf) == pytest.approx([0.25] * 19)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert {request.arrival for request in trace()} == {0.0}


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_begins_and_ends_at_its_rates(strategy: str) -> None:
    found = gaps(
        num_prompts=401, burstiness=math.inf, ramp_up_strategy=strategy, ramp_up_start_rps=1.0, ramp_up_end_rps=16.0
    )
    middle = 1 / found[199]
    assert (1 / found[0], 1 / found[-1]) == pytest.approx((1.0, 16.0), rel=0.05)
    assert middle == pytest.approx(8.5 if strategy == "linear" else 4.0, rel=0.02)


def test_adapters_are_as_popular_as_asked_for() -> None:
    names, count = ("a", "b", "c", "d"), 20_000

    def shares(assignment: str, **more: float) -> list[float]:
        made = trace(num_prompts=count, input_len=1, lora_modules=names, lora_assignment=assignment, **more)
        counts = Counter(request.adapter for request in made)
        return [counts[name] / count for name in names]

    def parts(*weights: float) -> Any:
        return pytest.approx([weight / sum(weights) for weight in weights], abs=5 * 0.5 / math.sqrt(count))

    assert shares("random") == parts(1, 1, 1, 1) == shares("uniform")
    assert shares("zipf") == parts(1, 1 / 2, 1 / 3, 1 / 4)
    assert shares("zipf", lora_zipf_exponent=2.0) == parts(1, 1 / 4, 1 / 9, 1 / 16)
    assert shares("skewed") == parts(1.5**3, 1.5**2, 1.5, 1)
    assert shares("round-robin") == [0.25] * 4
    turn = trace(num_prompts=6, lora_modules=names, lora_assignment="round-robin")
    assert [request.adapter for request in turn] == ["a", "b", "c", "d", "a", "b"]


def test_random_lengths_lie_in_their_range() -> None:
    made = trace(num_prompts=500, input_len=40, output_len=20, random_range_ratio=0.5, random_prefix_len=3)
    lengths = {len(request.prompt) for request in made}
    assert (min(lengths), max(lengths)) == (23, 63)
    assert {request.max_tokens for request in made} == set(range(10, 31))
    assert all(request.prompt_tokens == len(request.prompt) for request in made)
    assert len({tuple(request.prompt[:3]) for request in made}) == 1
    assert all(token in Words.ids for request in made for token in request.prompt)


def test_sharegpt_takes_first_turns_of_fitting_lengths(tmp_path: Path) -> None:
    def conversation(*turns: int) -> dict[str, Any]:
        return {"id": "x", "conversations": [{"from": "human", "value": "w " * turn} for turn in turns]}

    path = tmp_path / "share.json"
    path.write_text(
        json.dumps([conversation(*turns) for turns in [(5, 9, 3), (3, 9), (2000, 9), (9,), (6, 2), (7, 8)]])
    )
    made = trace(dataset_name="sharegpt", dataset_path=str(path), num_prompts=5, disable_shuffle=True)
    assert [(request.prompt_tokens, request.max_tokens) for request in made] == [(5, 9), (7, 8)] * 2 + [(5, 9)]
    made = trace(dataset_name="sharegpt", dataset_path=str(path), num_prompts=9, output_len=4)
    assert {(request.prompt_tokens, request.max_tokens) for request in made} == {(5, 4), (6, 4), (7, 4)}


def test_custom_files_may_name_lengths_adapters_and_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": "a", "output_len": 5, "lora": "sql"}, {"prompt": [1, 2], "output_tokens": 6, "more": 1},
        {"messages": messages},
    ]  # fmt: skip
    path = lines(tmp_path / "own.jsonl", *rows)
    Words.loaded = 0
    options = TraceOptions(dataset_name="custom", dataset_path=path, num_prompts=3, disable_shuffle=True, top_k=2)
    made = make_trace(options, Words.load)
    assert Words.loaded == 0
    assert [(r.prompt, r.max_tokens, r.adapter) for r in made] == [("a", 5, "sql"), ([1, 2], 6, None), ("", 128, None)]
    assert [request.fields for request in made] == [{"top_k": 2}] * 2 + [{"top_k": 2, "messages": messages}]


def test_a_timed_trace_keeps_its_times_and_shared_beginnings(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 5000, "input_length": 40, "output_length": 3, "hash_ids": [1, 2, 3]},
        {"timestamp": 4000, "input_length": 33, "output_length": 7, "hash_ids": [1, 2, 9]},
        {"timestamp": 7500, "input_length": 20, "output_length": 1, "hash_ids": []},
    ]
    path = lines(tmp_path / "timed.jsonl", *rows)
    made = trace(dataset_name="timed_trace", dataset_path=path, timed_trace_sec_multiplier=0.001)
    assert [(r.arrival, r.prompt_tokens, r.max_tokens) for r in made] == [(0.0, 33, 7), (1.0, 40, 3), (3.5, 20, 1)]
    assert [len(request.prompt) for request in made] == [33, 40, 20]
    assert made[0].prompt[:32] == made[1].prompt[:32]
    assert made[0].prompt[32] != made[1].prompt[32] and made[2].prompt[:5] != made[0].prompt[:5]
    sent = trace(dataset_name="timed_trace", dataset_path=path, self_timed=False, request_rate=2.0, num_prompts=4)
    assert sent[-1].arrival == pytest.approx(2.0)


def test_a_trace_written_is_read_again(tmp_path: Path) -> None:
    made = trace(num_prompts=5, lora_modules=("a",), seeded=True, ignore_eos=True, request_rate=1.0)
    write_trace(tmp_path / "trace.jsonl", made)
    assert read_trace(tmp_path / "trace.jsonl") == made
    assert len({request.fields["seed"] for request in made}) == 5


def test_prompts_of_ids_become_text(tmp_path: Path) -> None:
    vocabulary = Vocabulary.load("demo")
    made = make_trace(TraceOptions(num_prompts=2, input_len=9), lambda: vocabulary)
    assert as_text(made, vocabulary.decode)[0].prompt == vocabulary.decode(made[0].prompt)  # type: ignore[arg-type]
    assert vocabulary.lengths(["SELECT a FROM b"])[0] > 2
    with pytest.raises(InvalidRequestError, match="--tokenizer"):
        Vocabulary.load(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_prompts": 0}, "num_prompts"), ({"burstiness": 0.0}, "burstiness"),
        ({"request_rate": -1.0}, "request_rate"),
        ({"random_range_ratio": 1.0}, "random_range_ratio"), ({"random_prefix_len": -1}, "random_prefix_len"),
        ({"dataset_name": "sharegpt"}, "dataset_path"), ({"self_timed": True}, "self_timed"),
        ({"dataset_name": "timed_trace", "dataset_path": "x", "request_rate": 1.0}, "request_rate"),
        ({"ramp_up_strategy": "linear"}, "ramp_up_strategy"), ({"ramp_up_end_rps": 2.0}, "ramp_up_strategy"),
        ({"dataset_name": "custom", "dataset_path": "/nowhere.jsonl"}, "dataset_path"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        trace(**options)
    assert caught.value.param == field


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": 3}\n')
    with pytest.raises(InvalidRequestError, match=r"own\.jsonl, line 3"):
        trace(dataset_name="custom", dataset_path=str(path))
    with pytest.raises(InvalidRequestError, match=r"own\.jsonl, line 1"):
        read_trace(path)
