"""Norms that two products share: the layers hand on what was left, and only where it is used does the norm not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specserve.layers import storage
from specserve.layers.norm import RMSNorm
from specserve.loading import load_model
from specserve_kernels.tolerances import MODEL

STEPS = [{0: 40, 1: 5}, {1: 10, 2: 9}, {1: 12}]


def share_norms(monkeypatch: pytest.MonkeyPatch, *, takes: bool = True) -> list[str]:
    """As on a Hopper GPU, in torch. What then happens: "left", "taken" or "normed"."""
    happened: list[str] = []

    def noting(name: str, owner: Any, what: str) -> None:
        plain = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            happened.append(what)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(storage, "leaves_ahead", lambda x, weight, lora: lora is None)
    monkeypatch.setattr(storage, "takes_ahead", lambda ahead, weight: takes)
    noting("add_skinny_linear", storage, "left")
    noting("skinny_linear_ahead", storage, "taken")
    noting("rms_norm", storage, "normed")
    noting("forward", RMSNorm, "normed")
    return happened


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_outputs_are_those_of_plain_norms(family: str, save: Any, paged: Any, texts: Any, monkeypatch: Any) -> None:
    model = load_model(str(save(family).path), dtype="float64")
    plain = paged(model, texts).run(STEPS)
    happened = share_norms(monkeypatch)
    shared = paged(model, texts).run(STEPS)
    for one, other in zip(plain, shared, strict=True):
        torch.testing.assert_close(one, other, rtol=MODEL[torch.float64][0], atol=MODEL[torch.float64][1])
    # two layers a step: the first norm and the last are kernels, the three between are shared
    assert happened == ["normed", *["left", "taken"] * 3, "normed"] * len(STEPS)


def test_what_is_not_taken_is_normed(save: Any, paged: Any, texts: Any, monkeypatch: Any) -> None:
    model = load_model(str(save().path), dtype="float64")
    plain = paged(model, texts).run(STEPS)
    happened = share_norms(monkeypatch, takes=False)
    assert all(torch.equal(one, other) for one, other in zip(plain, paged(model, texts).run(STEPS), strict=True))
    assert "taken" not in happened and happened.count("normed") == 5 * len(STEPS)
