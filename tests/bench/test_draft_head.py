"""An exchanged head is what a pair of that α would have been loaded with, and drafts are accepted as it says."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch

from benchmarks.draft_head import DraftHead
from benchmarks.engines import Mode, Setup
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.shapes import load_settings
from specserve.models.decoder import Decoder


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_another_head_and_back(pair: Path, quantization: str) -> None:
    options = {"draft_quantization": quantization, "num_blocks": 1000}
    engine = SpecserveEngine(Setup(pair, Mode(0, 4), "cpu", "float32", options=options))
    settings = load_settings(pair)
    try:
        parameter = cast(Decoder, engine.core.built.runner.draft.model).parameters["lm_head.weight"]
        loaded = [part.clone() for part in (parameter.destination, parameter.scales) if part is not None]
        head = DraftHead(engine, settings, (0.0, 0.3, settings.alpha))
        prompts = [[(37 * i + 11 * j) % 1700 for j in range(8)] for i in range(24)]
        shares = {}
        for alpha in (0.3, 0.0):
            head.exchange(alpha)
            engine.generate(prompts, [None] * 24, 32)
            shares[alpha] = engine.facts()["accepted_first"]
        assert shares[0.3] == pytest.approx(0.3, abs=0.07)
        assert shares[0.0] == 0.0
        head.exchange(settings.alpha)
        parts = [part for part in (parameter.destination, parameter.scales) if part is not None]
        assert all(torch.equal(now.float(), before.float()) for now, before in zip(parts, loaded, strict=True))
    finally:
        engine.close()
