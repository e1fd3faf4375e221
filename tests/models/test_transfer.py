"""Checkpoint tensors reach their parameters whole, whatever the pieces, dtypes and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specserve.layers.storage import Parameter, whole
from specserve.loading import load_model
from specserve.loading.transfer import PIECE_BYTES, transfer


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous and transposed, converted, of lengths that pieces do not divide, and rows wider than a piece."""
    monkeypatch.setitem(PIECE_BYTES, "cpu", 256)
    generator = torch.Generator().manual_seed(0)
    merged = torch.zeros(33, 24)  # two parts side by side, each lying transposed
    one, other = merged.t().split_with_sizes((17, 7))
    parameters = [
        whole(one),
        whole(other),
        whole(torch.zeros(29, 11, dtype=torch.float64)),
        whole(torch.zeros(3, 200, dtype=torch.bfloat16)),
        whole(torch.zeros(300)),
        Parameter(torch.zeros(40, 6), (6,)),  # repeated
    ]
    tensors = [torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    done: list[int] = []
    transfer(zip(parameters, tensors, strict=True), done.append)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        expected = tensor.to(parameter.destination.dtype).expand_as(parameter.destination)
        assert torch.equal(parameter.destination, expected)
    assert sum(done) == sum(parameter.destination.nbytes for parameter in parameters)
    assert len(done) > 2 * len(parameters)


def test_a_tensor_that_cannot_be_loaded_ends_the_transfer() -> None:
    taken: list[int] = []

    def tensors() -> Any:
        for index in range(1000):
            taken.append(index)
            yield whole(torch.zeros(4)), torch.zeros(5)

    with pytest.raises(RuntimeError, match="size"):
        transfer(tensors(), lambda num_bytes: None)
    assert len(taken) < 1000


def test_a_model_loaded_in_inference_mode(save: Any) -> None:
    path = str(save().path)
    with torch.inference_mode():
        model = load_model(path)
    for name, parameter in load_model(path).parameters.items():
        assert torch.equal(model.parameters[name].destination, parameter.destination), name


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_if_asked(progress: bool, save: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = save().path
    capsys.readouterr()
    load_model(str(path), progress=progress)
    shown = capsys.readouterr().err
    assert (f"Loading weights of {path.name}" in shown and "100%" in shown) == progress
    assert progress or not shown
