"""Drafts of several proposers side by side: every row keeps its own, and a proposer without q is sure of its tokens."""

from __future__ import annotations

import torch

from specserve.runtime.drafting import merge_drafts
from specserve.speculation.proposer import Drafts

VOCAB = 7


def with_probs(rows: int, width: int) -> Drafts:
    torch.manual_seed(rows)
    probs = torch.rand(rows, width, VOCAB, dtype=torch.float64).softmax(-1)
    return Drafts(torch.randint(VOCAB, (rows, width)), torch.tensor([width] * rows), probs)


def one_hot(tokens: list[list[int]], counts: list[int]) -> Drafts:
    return Drafts(torch.tensor(tokens), torch.tensor(counts))


def test_rows_keep_their_own() -> None:
    model, ngram = with_probs(2, 3), one_hot([[4, 5], [6, 1]], [2, 1])
    merged = merge_drafts([(torch.tensor([4, 1]), model), (torch.tensor([0, 3]), ngram)], 5, VOCAB)
    assert merged.counts.tolist() == [2, 3, 0, 1, 3]
    assert merged.probs is not None and model.probs is not None
    for row, part in ((4, 0), (1, 1)):
        assert torch.equal(merged.tokens[row], model.tokens[part])
        assert torch.equal(merged.probs[row], model.probs[part])
    assert merged.tokens[0].tolist()[:2] == [4, 5] and merged.tokens[3].tolist()[:1] == [6]
    for row, column, token in ((0, 0, 4), (0, 1, 5), (3, 0, 6)):
        assert merged.probs[row, column].tolist() == [float(index == token) for index in range(VOCAB)]
    assert merged.probs.dtype == torch.float64


def test_nobody_has_probs() -> None:
    first, second = (torch.tensor([1]), one_hot([[4, 5, 6]], [3])), (torch.tensor([0]), one_hot([[2]], [0]))
    merged = merge_drafts([first, second], 3, VOCAB)
    assert merged.probs is None
    assert merged.counts.tolist() == [0, 3, 0]
    assert merged.tokens.shape == (3, 3) and merged.tokens[1].tolist() == [4, 5, 6]


def test_one_proposer_of_some_rows() -> None:
    merged = merge_drafts([([2, 0], with_probs(2, 1))], 3, VOCAB)
    assert merged.counts.tolist() == [1, 0, 1]
    assert merged.probs is not None and merged.probs.shape == (3, 1, VOCAB)
