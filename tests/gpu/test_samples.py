"""The kernels' samples follow the target's distribution: χ² over 10⁶ rows, as
tests/sampling/test_verify_distribution.py does for the references; and it finds a wrong q out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lawbook.chains import MANY, P_VALUE, PARAMS, Setting, chains, generate, p_values, p_values_of_many

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
@pytest.mark.parametrize("num_drafts", [0, 4])
@pytest.mark.parametrize("params", PARAMS)
def test_a_million_samples(params: str, num_drafts: int, is_coupled: bool) -> None:
    setting = Setting(*chains(PARAMS[params], torch.float32, "cuda"), num_drafts, is_coupled, ragged=num_drafts > 0)
    assert min(p_values_of_many(setting, MANY)) > P_VALUE


def test_a_wrong_q_is_found_out() -> None:
    setting = Setting(*chains(PARAMS["top_p"], torch.float32, "cuda"), 2, is_coupled=False)
    _, unprocessed = chains(PARAMS["plain"], torch.float32, "cuda")
    wrong = replace(setting, claimed_q=unprocessed.softmax(-1))
    assert min(p_values(wrong, generate(wrong))) < P_VALUE
