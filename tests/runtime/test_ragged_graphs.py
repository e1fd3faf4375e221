"""Ragged graphs: what a graph of a bucket reads is the step's layout and padding, whatever it read before."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from specserve.device import Graph
from specserve.runtime import capture as capture_module
from specserve.runtime.capture import capture
from specserve.runtime.layout import StepLayout, pack_layout
from specserve.runtime.model_state import ModelState
from specserve.runtime.packing import Packer
from specserve.runtime.ragged_graphs import RaggedGraphs, token_buckets, verification_buckets
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork

MAX_ROWS, MAX_TOKENS, PADDING_ROW, CPU = 5, 40, 9, torch.device("cpu")


class FakeTarget:
    """Its hidden states tell what was asked; it remembers how."""

    def __init__(self, *, adapters_behind: bool = False) -> None:
        self.adapters_behind = adapters_behind
        self.model = SimpleNamespace(spec=SimpleNamespace(hidden_size=2, dtype=torch.float32))
        self.work = AdapterWork.NONE
        self.counted = 0
        self.asked: list[tuple[StepLayout, tuple[int, ...], AdapterWork]] = []

    def forward(
        self, rows: DeviceRows, layout: StepLayout, positions: None, bounds: tuple[int, ...], *, work: AdapterWork
    ) -> Tensor:
        self.asked.append((layout, bounds, work))
        return torch.stack((layout.token_rows, layout.positions), dim=1).float()

    def adapter_work(self, rows: DeviceRows, layout: StepLayout, num_tokens: int) -> AdapterWork:
        self.counted = num_tokens
        return self.work


class Again:
    """What a CUDA graph does, on a CPU: the same work on the same memory."""

    def __init__(self, work: Any) -> None:
        self.replay = work


def ragged_graphs(target: FakeTarget, max_query_len: int | None = None, sizes: list[int] | None = None) -> RaggedGraphs:
    rows = SimpleNamespace(num_tokens=torch.zeros(PADDING_ROW + 1, dtype=torch.int64), padding_row=PADDING_ROW)
    graphs = RaggedGraphs(
        cast(ModelState, target), cast(DeviceRows, rows), sizes or token_buckets(MAX_TOKENS), max_rows=MAX_ROWS,
        max_context=64, max_query_len=max_query_len,
    )  # fmt: skip
    for key, work in graphs.works(with_adapters=True).items():
        graphs.graphs[key] = cast(Graph, Again(work))
    return graphs


def layout_of(rows: list[int], lens: list[int], starts: list[int | None]) -> StepLayout:
    packer = Packer()
    layout = pack_layout(rows, lens, packer, starts)
    packer.upload(CPU)
    return layout.on_device(packer)


STEPS: list[tuple[list[int], list[int], list[int | None]]] = [
    ([4, 0, 2, 1, 3], [1, 3, 1, 10, 25], [None, None, None, 7, 0]),  # everything is full
    ([2], [1], [None]),  # after it, nearly nothing
    ([0, 1], [16, 1], [None, 3]),
    ([3, 1, 0], [1, 14, 1], [None, 5, 2]),
]


@pytest.mark.parametrize("steps", list(itertools.permutations(STEPS, 2)))
def test_padded_as_it_should_be(steps: list[tuple[list[int], list[int], list[int | None]]]) -> None:
    target = FakeTarget()
    graphs = ragged_graphs(target)
    for rows, lens, starts in steps:
        layout = layout_of(rows, lens, starts)
        count, size = sum(lens), next(size for size in (16, 32, 40) if size >= sum(lens))
        hidden = graphs.run(layout)
        assert torch.equal(hidden, torch.stack((layout.token_rows, layout.positions), dim=1).float())
        given, bounds, _ = target.asked[-1]
        assert target.counted == size  # kernels are launched for that many
        assert given.query_lens is None and given.max_query_len == size == len(given.token_rows)
        assert bounds == (64,) * MAX_ROWS
        assert given.token_rows[count:].tolist() == [PADDING_ROW] * (size - count)
        assert not given.positions[count:].any()
        assert given.row_index.tolist() == [*rows, *[PADDING_ROW] * (MAX_ROWS - len(rows))]
        assert given.query_start.diff().tolist() == [*lens, *[0] * (MAX_ROWS - len(rows))]


def test_the_same_step_again() -> None:
    """Its inputs are there already; another step in between takes their place."""
    graphs = ragged_graphs(FakeTarget())
    first, second = (layout_of(*STEPS[index]) for index in (0, 2))
    wanted = graphs.run(first).clone()
    assert torch.equal(graphs.run(first), wanted)
    graphs.run(second)
    assert torch.equal(graphs.run(first), wanted)


def test_many_adapters_where_no_graph_is_for_many() -> None:
    target = FakeTarget()
    graphs = ragged_graphs(target)
    target.work = AdapterWork.MANY
    graphs.run(layout_of([0], [1], [None]))
    assert target.asked[-1][2] is AdapterWork.MANY
    del graphs.graphs[16, AdapterWork.MANY]
    graphs.run(layout_of([1], [1], [None]))
    assert target.asked[-1][2] is AdapterWork.SOME


@pytest.mark.parametrize(
    ("behind", "max_query_len", "many"), [(True, None, True), (True, 8, False), (False, None, False)]
)
def test_prompts_with_decodes_among_them_have_graphs_where_that_matters(
    behind: bool, max_query_len: int | None, many: bool
) -> None:
    keys = ragged_graphs(FakeTarget(adapters_behind=behind), max_query_len, [16, 128, 192]).graphs.keys()
    assert {size for size, kind in keys if kind is AdapterWork.MANY} == ({16, 128, 192} if many else {16, 128})
    assert len(keys) == (9 if many else 8)


def test_what_has_room() -> None:
    graphs, short = ragged_graphs(FakeTarget()), ragged_graphs(FakeTarget(), max_query_len=3)
    assert graphs.can_run([MAX_TOKENS]) and not graphs.can_run([MAX_TOKENS + 1])
    assert graphs.can_run([1] * MAX_ROWS) and not graphs.can_run([1] * (MAX_ROWS + 1))
    assert short.can_run([3, 3]) and not short.can_run([1, 4])
    assert not graphs.can_run([])


@pytest.mark.parametrize(
    ("max_tokens", "sizes"), [(7, [7]), (16, [16]), (100, [16, 32, 48, 64, 100]), (128, [16, 32, 48, 64, 128])]
)
def test_buckets(max_tokens: int, sizes: list[int]) -> None:
    assert token_buckets(max_tokens) == sizes


def test_buckets_end() -> None:
    assert token_buckets(8192)[-2:] == [960, 1024]


@pytest.mark.parametrize(("max_tokens", "sizes"), [(4, [4]), (20, [8, 16, 20]), (100, [*range(8, 65, 8), 80, 96, 100])])
def test_buckets_of_verifications(max_tokens: int, sizes: list[int]) -> None:
    assert verification_buckets(max_tokens) == sizes


def test_all_is_captured_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was done once before, and not within its own capture."""
    target, captured = FakeTarget(), []

    def fake(work: Any, pool: object) -> Again:
        assert pool is CPU
        before = len(target.asked)
        work()
        captured.append(target.asked[-1])
        assert [ask[0].token_rows.shape for ask in target.asked[before - 1 :]] == [captured[-1][0].token_rows.shape] * 2
        return Again(work)

    monkeypatch.setattr(capture_module, "Graph", fake)
    monkeypatch.setattr(capture_module, "capturing", nullcontext)
    monkeypatch.setattr(capture_module, "reserved_memory", lambda device: 7)
    graphs = ragged_graphs(target)
    graphs.graphs.clear()
    facts = capture([graphs], CPU, with_adapters=False, progress=False)
    assert [len(layout.token_rows) for layout, _, _ in captured] == [40, 32, 16]
    assert set(graphs.graphs) == {(size, AdapterWork.NONE) for size in (40, 32, 16)}
    assert (facts["count"], facts["bytes"]) == (3, 0)
