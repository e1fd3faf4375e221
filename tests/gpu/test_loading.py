"""Tensors reach a CUDA device whole through page-locked pieces, and rotary rows come from a captured graph."""

from __future__ import annotations

import pytest
import torch

from specserve.layers.rotary import Rotary
from specserve.layers.storage import DenseStorage, Parameter, whole
from specserve.loading.transfer import PIECE_BYTES, transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pieces_make_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PIECE_BYTES, "cuda", 1 << 14)
    device = torch.device("cuda")
    merged = DenseStorage(200, (301, 77), bias=True, dtype=dtype, device=device)
    parameters = [parameter for part in merged.parameters() for parameter in part.values()]
    parameters += [
        whole(torch.zeros(3, 9000, dtype=dtype, device=device)),
        whole(torch.zeros(130, 200, dtype=dtype, device=device).t()),
        Parameter(torch.zeros(6, 128, dtype=dtype, device=device), (128,)),
    ]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(parameter.shape, generator=generator).bfloat16() for parameter in parameters]
    done: list[int] = []
    transfer(zip(parameters, tensors, strict=True), done.append)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        assert torch.equal(parameter.destination.cpu(), tensor.to(dtype).expand(parameter.destination.shape))
    assert sum(done) == sum(parameter.destination.nbytes for parameter in parameters)


def test_rotary_rows_follow_the_positions_of_a_replay() -> None:
    table = Rotary({"rope_theta": 1e4}, 64, max_positions=512, dtype=torch.bfloat16, device=torch.device("cuda"))
    positions = torch.zeros(7, dtype=torch.int64, device="cuda")
    table.at(positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cos, sin = table.at(positions)
    positions.copy_(torch.tensor([511, 0, 3, 3, 200, 77, 1]))
    graph.replay()
    expected = table.at(positions)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])
