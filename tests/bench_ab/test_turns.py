"""Who is measured when, and on which requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from specserve.bench.deadline import Deadline
from specserve.bench.options import TraceOptions
from specserve.bench.plan import AbOptions, make_plan
from specserve.bench.records import Load
from specserve.bench.turns import Turn, in_blocks, interleaved
from specserve.bench.words import load_name
from specserve.core.errors import InvalidRequestError

ONE: Load = {"concurrency": 1}
MANY: Load = {"concurrency": 16}


class Numbers:
    """A vocabulary without a model."""

    def __init__(self) -> None:
        self.ids = list(range(1000))

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]


def names(turns: Sequence[Turn]) -> str:
    return "".join(turn.variant.lower() if turn.warm_up else turn.variant for turn in turns)


def test_turns_alternate() -> None:
    assert names(interleaved(["A", "B"], [ONE], 4)) == "ab" + "ABBAABBA"
    assert names(interleaved(["A", "B", "C"], [ONE], 2)) == "abc" + "ABCCBA"


def test_a_steady_drift_cancels_over_two_rounds() -> None:
    places = {"A": 0, "B": 0}
    for place, turn in enumerate(turn for turn in interleaved(["A", "B"], [ONE], 2) if not turn.warm_up):
        places[turn.variant] += place
    assert places["A"] == places["B"]


def test_every_load_has_its_rounds() -> None:
    turns = [turn for turn in interleaved(["A", "B"], [ONE, MANY], 3) if not turn.warm_up]
    assert {(turn.variant, load_name(turn.load), turn.round) for turn in turns} == {
        (name, load, number) for name in "AB" for load in ("concurrency 1", "concurrency 16") for number in range(3)
    }
    assert len(turns) == 12
    # A and B of one load and round follow each other.
    assert all(
        one.round == other.round and one.load == other.load for one, other in zip(turns[::2], turns[1::2], strict=True)
    )


def test_blocks_start_each_server_once_and_one_of_them_twice() -> None:
    assert names(in_blocks(["A", "B"], [ONE], 4)) == "aAA" + "bBBBB" + "aAA"
    assert names(in_blocks(["A", "B"], [ONE], 1)) == "aA" + "bB"
    rounds = [turn.round for turn in in_blocks(["A", "B"], [ONE], 3) if turn.variant == "A" and not turn.warm_up]
    assert rounds == [0, 1, 2]


def test_no_request_is_sent_twice() -> None:
    plan = make_plan(AbOptions(concurrency=(2, 4), rounds=3), TraceOptions(input_len=8, output_len=4), Numbers)
    prompts = [tuple(one.prompt) for trace in plan.traces.values() for one in trace]
    assert len(set(prompts)) == len(prompts)
    assert {len(trace) for (load, _), trace in plan.traces.items() if load == "concurrency 4"} == {9}
    assert len(plan.traces) == 2 * (3 + 1)


def test_the_same_seed_gives_the_same_requests() -> None:
    first, second, other = (make_plan(AbOptions(), TraceOptions(seed=seed), Numbers) for seed in (1, 1, 7))
    assert first == second
    assert first != other


def test_rates_begin_every_run_at_once_and_last_seconds() -> None:
    plan = make_plan(AbOptions(rates=(5.0,), rounds=2), TraceOptions(), Numbers)
    for trace in plan.traces.values():
        assert len(trace) == 50
        assert trace[0].arrival == 0.0
        assert 5.0 < trace[-1].arrival < 20.0
    assert plan.loads == [{"rate": 5.0}]
    shorter = make_plan(AbOptions(rates=(5.0,), rounds=2, seconds=6.0), TraceOptions(), Numbers)
    assert {len(trace) for trace in shorter.traces.values()} == {30}


def test_a_warm_up_may_be_short() -> None:
    plan = make_plan(AbOptions(rates=(5.0, 8.0), rounds=2, warm_up=4), TraceOptions(), Numbers)
    assert [len(trace) for trace in plan.traces.values()] == [4, 50, 50, 4, 80, 80]
    prompts = [tuple(one.prompt) for trace in plan.traces.values() for one in trace]
    assert len(set(prompts)) == len(prompts)
    assert all(trace[0].arrival == 0.0 for trace in plan.traces.values())


def asked(options: AbOptions, trace: TraceOptions, **more: Any) -> dict[str, set[str | None]]:
    """The adapters of each load's requests."""
    plan = make_plan(options, trace, Numbers, **more)
    found: dict[str, set[str | None]] = {load_name(load): set() for load in plan.loads}
    for (load, _), requests in plan.traces.items():
        found[load] |= {request.adapter for request in requests}
    return found


def test_adapters_in_use_are_a_load() -> None:
    trace = TraceOptions(lora_modules=("a", "b", "c"), lora_assignment="round-robin", input_len=8)
    options = AbOptions(concurrency=(2, 4), adapters=(0, 1, 3), rounds=2)
    each = {"0 adapters": {None}, "1 adapter": {"a"}, "3 adapters": {"a", "b", "c"}}
    assert asked(options, trace) == {
        f"concurrency {number}, {load}": names for number in (2, 4) for load, names in each.items()
    }


def test_ranks_in_use_are_a_load() -> None:
    trace = TraceOptions(lora_modules=("a", "b", "c"), lora_assignment="round-robin", input_len=8)
    options = AbOptions(rates=(3.0,), ranks=(0, 8, 64), rounds=2)
    found = asked(options, trace, ranks=lambda: {"a": 8, "b": 64, "c": 8})
    assert found == {
        "3 requests/s, rank 0": {None}, "3 requests/s, rank 8": {"a", "c"}, "3 requests/s, rank 64": {"b"},
    }  # fmt: skip
    with pytest.raises(InvalidRequestError, match="finds no adapter of rank 64 in --lora-modules: a has 8, b has 8,"):
        asked(options, trace, ranks=lambda: dict.fromkeys("abc", 8))
    with pytest.raises(InvalidRequestError, match="needs sides that name the folder of each adapter: not of b, c"):
        asked(options, trace, ranks=lambda: {"a": 8})


def test_a_dataset_with_adapters_of_its_own_leaves_none_to_vary(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello", "lora": "b"}\n{"prompt": "Good day"}\n')
    trace = TraceOptions(dataset_name="custom", dataset_path=str(path), lora_modules=("a", "b"))
    with pytest.raises(InvalidRequestError, match="--dataset-path names adapters itself"):
        make_plan(AbOptions(adapters=(0, 1)), trace, Numbers)
    assert asked(AbOptions(adapters=(2,), rounds=9), trace) != {}  # all that it names are in use


def test_no_round_begins_that_would_end_too_late() -> None:
    """Rounds of 40 s after a start of 60 s and a warm-up of 10: three end within 210 s, a fourth would not."""
    clock = [0.0]
    deadline = Deadline(3.5, lambda: clock[0])
    clock[0] = 60.0
    begun = []
    for turn in interleaved(["A", "B"], [ONE, MANY], 6):
        if not deadline.allows(turn):
            break
        begun.append(turn)
        clock[0] += 2.5 if turn.warm_up else 10.0
    assert names(begun) == "abab" + "ABAB" + "BABA" + "ABAB"
    assert clock[0] == 60.0 + 4 * 2.5 + 3 * 40.0


def test_the_longest_round_counts_and_the_first_one_always_begins() -> None:
    clock = [0.0]
    deadline, (first, second, third) = Deadline(1.0, lambda: clock[0]), (Turn("A", ONE, number) for number in range(3))
    clock[0] = 100.0  # a start that took all of the time
    assert deadline.allows(first)
    assert not deadline.allows(second)
    deadline = Deadline(1.0, lambda: clock[0])
    assert deadline.allows(first)
    clock[0] = 125.0
    assert deadline.allows(second)
    clock[0] = 136.0  # 11 s, but the one before took 25
    assert not deadline.allows(third)
    assert Deadline(None, lambda: clock[0]).allows(third)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (AbOptions(rounds=0), "--rounds must be positive"),
        (AbOptions(requests=0), "--requests must be positive"),
        (AbOptions(seconds=math.nan), "--seconds must be positive"),
        (AbOptions(warm_up=0), "--warm-up must be positive"),
        (AbOptions(minutes=math.nan), "--minutes must be positive"),
        (AbOptions(minutes=5.0, one_at_a_time=True), "--minutes goes with servers that are resident together"),
        (AbOptions(concurrency=(4, 0)), "--concurrency must hold positive numbers, not 0"),
        (AbOptions(rates=(math.nan,)), "--rates must hold positive numbers"),
        (AbOptions(rates=(math.inf,)), "--rates must hold positive numbers"),
        (AbOptions(concurrency=(2, 4, 2)), "--concurrency must name each load once"),
        (AbOptions(adapters=(0, -1)), "--adapters must hold no negative numbers"),
        (AbOptions(ranks=(8, 8)), "--ranks must name each load once"),
        (AbOptions(adapters=(0,), ranks=(8,)), "--ranks and --adapters are varied one at a time"),
        (AbOptions(adapters=(0, 3)), "--adapters takes the first 3 of --lora-modules, which names 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: AbOptions, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        make_plan(options, TraceOptions(), Numbers)
