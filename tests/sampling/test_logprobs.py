"""Log-probabilities of the raw logits: the chosen token's and the likeliest ones'."""

from __future__ import annotations

import math

import pytest
import torch

from specserve.sampling.logprobs import logprobs


@pytest.mark.parametrize("num_top", [0, 1, 5, 99])
def test_equals_a_softmax_by_hand(num_top: int) -> None:
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    tokens = torch.tensor([[0, 1], [8, 4], [4, 4]])
    result = logprobs(logits, tokens, num_top)
    assert result.top_tokens.shape == (3, 2, min(num_top, 9))
    for row in range(3):
        for column in range(2):
            values = logits[row, column].tolist()
            total = sum(math.exp(value) for value in values)
            exact = [value - math.log(total) for value in values]
            assert result.chosen[row, column].item() == pytest.approx(exact[int(tokens[row, column])], abs=1e-12)
            order = sorted(range(9), key=lambda token: -exact[token])[:num_top]
            assert result.top_tokens[row, column].tolist() == order
            assert result.top_values[row, column].tolist() == pytest.approx([exact[t] for t in order], abs=1e-12)


def test_half_precision_is_computed_in_float32() -> None:
    logits = (torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    raw, tokens = logits.clone(), torch.arange(4)
    result = logprobs(logits, tokens, 2)
    assert result.chosen.dtype == torch.float32
    exact = logits.double().log_softmax(-1)[torch.arange(4), tokens]
    torch.testing.assert_close(result.chosen.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, raw)
