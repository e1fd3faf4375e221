"""Weights of one byte on a GPU: quantised as on a CPU, without a copy of the whole beside them."""

from __future__ import annotations

import pytest
import torch

from specserve.layers.quantised import QuantisedHead, QuantisedStorage
from specserve.loading.transfer import PIECE_BYTES, THREADS, transfer
from specserve_kernels.skinny.codes import Kind

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_codes_are_those_of_a_cpu(kind: Kind) -> None:
    tensors = [torch.randn(301, 208, dtype=torch.bfloat16), torch.randn(77, 208, dtype=torch.bfloat16)]
    loaded = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        storage = QuantisedStorage(kind, 208, (301, 77), bias=False, dtype=torch.bfloat16, device=device)
        parameters = [part["weight"] for part in storage.parameters()]
        transfer(zip(parameters, tensors, strict=True), lambda num_bytes: None)
        loaded.append(parameters)
    for one, other in zip(*loaded, strict=True):
        assert torch.equal(one.destination.float(), other.destination.float().cpu())
        assert one.scales is not None
        assert other.scales is not None
        assert torch.equal(one.scales, other.scales.cpu())


def test_loading_needs_a_few_pieces_beside_the_codes() -> None:
    device = torch.device("cuda")
    head = QuantisedHead("fp8", 65536, 8192, device=device)  # of 0.5 GB
    tensor = torch.zeros(1, dtype=torch.bfloat16).expand(65536, 8192)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    transfer([(head.parameters()["weight"], tensor)], lambda num_bytes: None)
    # Of a piece of codes: bfloat16 and three times float32, each on THREADS threads.
    assert torch.cuda.max_memory_allocated() - before <= THREADS * 16 * PIECE_BYTES["cuda"]
