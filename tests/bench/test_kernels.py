"""The kernels' benchmark on tiny shapes, where the references run: it counts right, and sees a wrong kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.ops import __main__ as command
from benchmarks.ops import activation, attention, norm, qkv, sampling, skinny, top_k_top_p
from benchmarks.ops import case as cases
from benchmarks.ops.__main__ import OPS, main, run
from benchmarks.ops.case import SMALL, Case, Setting, copies, differing, relative
from benchmarks.ops.timing import Rates, micros

TINY = replace(SMALL, rows=(1, 2), prompt=16 * 17)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MOST_COPIES", 2)


def test_every_case_is_right_and_kept(tmp_path: Path) -> None:
    rows = run(list(OPS), TINY, tmp_path / "rows.jsonl")
    assert {row["op"] for row in rows} == set(OPS)
    assert [row for row in rows if not row["right"]] == []
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in kept] == [row["case"] for row in rows]
    assert {"commit", "date", "torch", "triton", "driver", "device", "copy_tb_s", "us", "error"} <= set(kept[0])


def test_wrong_and_failing_kernels_are_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(gate_up: Tensor) -> Tensor:
        raise ValueError("no such kernel")

    monkeypatch.setattr(command, "FULL", SMALL)
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: x * 1.1)
    monkeypatch.setattr(activation, "silu_mul", fails)
    assert main(["--only", "norm,activation,qkv"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("Their times and shares mean nothing.")  # on a CPU
    assert out.count("WRONG") == len([*norm.cases(SMALL)])
    assert "FAILED ValueError: no such kernel" in out
    assert out.count("\nqkv ") == len([*qkv.cases(SMALL)])


def test_an_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "norm,softmax"])
    assert "no such op: softmax" in capsys.readouterr().err


def moved(call: Callable[[], object]) -> int:
    """Bytes of what one call is given and of what it returns."""
    assert isinstance(call, partial)
    given = [*call.args, *call.keywords.values(), call()]
    tensors = [one for one in given if isinstance(one, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("of", [norm.cases, activation.cases, skinny.cases, sampling.cases, top_k_top_p.cases])
def test_bytes_are_those_of_the_arguments_and_the_result(of: Callable[[Setting], list[Case]]) -> None:
    # What is not counted are weights of norms, settings and tokens: a few numbers a row.
    for case in of(TINY):
        if "drafted" in case.name:  # returns a tuple
            continue
        slack = 4 * TINY.shape.hidden + 64 * TINY.rows[-1]
        assert 0 <= moved(case.calls[0]) - case.bytes <= slack, case.name


def test_attention_counts_the_pairs_that_see_each_other() -> None:
    sequences = [(3, 5), (0, 17), (40, 1)]
    case = attention.case(TINY, "mixed", sequences)
    meta = attention.metadata(sequences, torch.device("cpu"))
    pairs = int((meta.positions + 1).sum())
    assert case.flops == 4 * pairs * TINY.shape.heads * TINY.shape.head_dim
    used = [set(table[table > 0].tolist()) for table in meta.block_tables]
    assert [len(pages) for pages in used] == [1, 2, 3]
    assert len(set.union(*used)) == 6
    assert len(set(meta.slot_mapping.tolist())) == 23


def test_copies_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MOST_COPIES", 64)
    assert [len(copies(int, size)) for size in (1e3, 10e6, 100e6, 1e9)] == [64, 18, 2, 2]


def test_floors_and_errors() -> None:
    rates = Rates(copy=4e12, product=8e14)
    assert rates.floor_micros(4e6, 0.0) == pytest.approx(1.0)
    assert rates.floor_micros(4e6, 1.6e9) == pytest.approx(2.0)
    want = torch.tensor([1.0, -4.0])
    assert relative(torch.tensor([1.5, -4.0]), want) == pytest.approx(0.125)
    assert relative(torch.tensor([float("nan"), -4.0]), want) == float("inf")
    assert differing(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.25


def test_every_buffer_is_used_in_turn() -> None:
    seen: list[int] = []
    micros([partial(seen.append, i) for i in range(3)], torch.device("cpu"))
    assert seen == [0, 1, 2]
