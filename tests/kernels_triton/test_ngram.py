"""The n-gram lookup against its reference."""

from __future__ import annotations

import pytest
import torch

from specserve_kernels import ngram
from specserve_kernels.ngram import ngram_lookup_ref, ngram_lookup_triton


@pytest.mark.parametrize(("vocab", "width"), [(2, 40), (5, 70), (40, 70), (400, 70)])
@pytest.mark.parametrize(("min_ngram", "max_ngram"), [(1, 3), (2, 2), (1, 5)])
def test_kernel_is_the_reference(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, vocab: int, width: int, min_ngram: int, max_ngram: int
) -> None:
    """Rows shorter and longer than a block, of one token and as wide as the memory; what lies behind them is likely."""
    monkeypatch.setattr(ngram, "BLOCK", 16)
    generator = torch.Generator().manual_seed(vocab)
    history = torch.randint(vocab, (9, width), generator=generator).to(device)
    num_tokens = torch.tensor([1, 2, 3, 15, 16, 17, 18, 33, width], device=device)
    rows = torch.tensor([8, 0, 3, 4, 5, 7, 1, 2, 6], device=device)
    limits = torch.tensor([5, 3, 1, 5, 4, 2, 5, 5, 5], device=device)
    arguments = (history, num_tokens, rows, limits, 5, min_ngram, max_ngram)
    tokens, counts = ngram_lookup_triton(*arguments)
    wanted_tokens, wanted_counts = ngram_lookup_ref(*arguments)
    assert torch.equal(counts, wanted_counts)
    assert torch.equal(tokens, wanted_tokens)
    if vocab < 10:
        assert counts.sum() > 0
