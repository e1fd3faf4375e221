"""The engine is right on the sensitive twin, and the comparison would see if it were not."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.engines import Mode, Setup
from benchmarks.reference import Reference
from benchmarks.twin import check_twin, compare, exchanged


def test_the_twin_passes_and_its_controls_fail(twin: Path) -> None:
    outcomes = check_twin(Setup(twin, Mode(2, 3), "cpu", "float32"), [1, 5])
    for outcome in outcomes.values():
        assert outcome["passed"], outcome
        assert outcome["controls_failed"] == {
            "page_replaced": True, "adapters_exchanged": True, "companions_exchanged": True
        }  # fmt: skip
        assert outcome["max_err"] < 1e-4
        assert min(outcome["controls_err"].values()) > 1e-2
        assert outcome["draft"]["passed"]


def test_a_base_models_twin_has_the_page_control(twin: Path) -> None:
    outcome = check_twin(Setup(twin, Mode(0, 0), "cpu", "float32"), [2])[2]
    assert outcome["passed"] and outcome["controls_failed"] == {"page_replaced": True}


def test_one_wrong_row_fails_the_comparison() -> None:
    right = [torch.full((24, 21), -3.0) for _ in range(4)]
    noisy = [row + 0.01 for row in right]
    assert compare(noisy, right, torch.bfloat16)["passed"]
    wrong = [*noisy[:3], right[3] + 0.04]
    assert compare(wrong, right, torch.bfloat16) | {"passed": False, "rows_failed": 1} == compare(
        wrong, right, torch.bfloat16
    )
    lost = [*noisy[:3], torch.full((24, 21), float("nan"))]
    assert not compare(lost, right, torch.bfloat16)["passed"]


def test_adapters_are_exchanged_in_pairs() -> None:
    assert exchanged(["a0", "a1", "a2", None], 3) == ["a1", "a0", "a0", None]
    assert exchanged(["a0"], 1) == [None]


def test_where_the_engine_chooses_it_is_also_made_to_draft(twin: Path) -> None:
    outcome = check_twin(Setup(twin, Mode(2, None), "cpu", "float32"), [3])[3]
    assert outcome["passed"] and outcome["forced"]["k"] == 4 and outcome["forced"]["accepted"] > 0
    assert outcome["forced"]["draft"]["passed"] and "companions_exchanged" in outcome["forced"]["controls_failed"]


def test_quantised_models_are_judged_by_rounded_references(twin: Path) -> None:
    """What quantising loses is no error of the engine; against weights as they are it would look like one."""
    setup = Setup(twin, Mode(2, 3), "cpu", "float32", options={"quantization": "fp8", "draft_quantization": "fp8"})
    outcome = check_twin(setup, [3])[3]
    assert outcome["passed"], outcome
    assert outcome["draft"]["passed"]
    assert outcome["max_err"] < 1e-4
    plain = Reference(twin / "target", {}, "cpu")
    rounded = Reference(twin / "target", {}, "cpu", "fp8")
    tokens = [torch.tensor([[1], [2]])]
    lost, kept = (reference.logprobs([[5, 6, 1, 2]], [None], [2], tokens)[0] for reference in (rounded, plain))
    assert (lost - kept).abs().max() > 1e-2
