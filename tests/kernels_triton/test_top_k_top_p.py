"""The threshold search against the sorting reference: the same tokens stay, ties included."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specserve_kernels.sampling import threshold
from specserve_kernels.sampling.selection import top_k_top_p_ref

# (top_k, top_p) a row: each alone, both, neither, and extremes
SETTINGS = [(3, 1.0), (0, 0.6), (9, 0.7), (0, 0.93), (1, 1.0), (0, 1.0), (0, 1e-9), (40, 0.99)]


def arguments(device: torch.device, vocab: int, settings: list[tuple[int, float]] = SETTINGS) -> tuple[object, ...]:
    top_k = torch.tensor([min(k, vocab) or vocab for k, _ in settings], device=device)
    top_p = torch.tensor([p if p < 1 else math.inf for _, p in settings], device=device)
    max_top_k = max(k for k, _ in settings if k < vocab)
    return top_k, top_p, max_top_k, any(p < 1 for _, p in settings), any(p < 1 and not k for k, p in settings)


def assert_same(logits: Tensor, top_k: Tensor, top_p: Tensor, *flags: object) -> None:
    expected = top_k_top_p_ref(logits.double(), top_k, top_p.double(), *flags).float()  # type: ignore[arg-type]
    before = logits.clone()
    assert torch.equal(threshold.top_k_top_p_triton(logits, top_k, top_p, *flags), expected)  # type: ignore[arg-type]
    assert torch.equal(logits, before), "the input stays"


def normal(device: torch.device, *shape: int, spread: float = 2.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * spread).to(device)


@pytest.mark.parametrize(("vocab", "spread"), [(5, 2.0), (50, 2.0), (2311, 3.0), (2311, 0.05)])
def test_equals_sorting(device: torch.device, vocab: int, spread: float) -> None:
    assert_same(normal(device, len(SETTINGS), 1, vocab, spread=spread), *arguments(device, vocab))


@pytest.mark.parametrize("vocab", [16, 600])
def test_ties_go_to_the_lower_token_id(device: torch.device, vocab: int) -> None:
    # 1.75 keeps the crossing of p away from a multiple of a tie's mass
    logits = torch.round(normal(device, len(SETTINGS), 2, vocab, spread=1.0)) * 1.75
    assert_same(logits, *arguments(device, vocab))


def test_impossible_tokens_and_strides(device: torch.device) -> None:
    logits = normal(device, 2, len(SETTINGS), 600)
    logits[:, :, ::3] = -math.inf
    logits[:, :, 1] = 0.0
    logits[:, :, 2] = -0.0
    assert_same(logits.transpose(0, 1), *arguments(device, 600))


@pytest.mark.parametrize("settings", [[(500, 1.0), (3, 1.0)], [(0, 0.9), (0, 0.2)], [(450, 0.8), (0, 0.3)]])
def test_more_candidates_than_the_list_holds(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, settings: list[tuple[int, float]]
) -> None:
    monkeypatch.setattr(threshold, "CAPACITY", 32)
    logits = normal(device, 2, 1, 600, spread=0.01)
    assert_same(logits, *arguments(device, 600, settings))


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    logits = normal(device, len(SETTINGS), 1, 300)
    top_k, top_p, *flags = arguments(device, 300)
    together = threshold.top_k_top_p_triton(logits, top_k, top_p, *flags)  # type: ignore[arg-type]
    for row in range(len(SETTINGS)):
        one = slice(row, row + 1)
        alone = threshold.top_k_top_p_triton(logits[one], top_k[one], top_p[one], *flags)  # type: ignore[arg-type,index]
        assert torch.equal(alone, together[one])
