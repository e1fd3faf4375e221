"""The n-gram lookup against a search in plain Python."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specserve.speculation.ngram import MAX_NGRAM, MIN_NGRAM, ngram_lookup

WIDTH = 24
JUNK = 3  # what stands past a row's tokens: a likely token, so that reading it would show


def looked_up(tokens: list[int], max_drafts: int) -> list[int]:
    """Longest suffix first, latest earlier match first; what followed it."""
    for n in range(min(MAX_NGRAM, len(tokens)), MIN_NGRAM - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == tokens[-n:]:
                return tokens[end + 1 : end + 1 + max_drafts]
    return []


rows = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=WIDTH), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(rows=rows, max_drafts=st.integers(1, 8))
@example(rows=[[3]], max_drafts=4)
@example(rows=[[3, 3, 3]], max_drafts=4)
@example(rows=[[1] * WIDTH], max_drafts=8)
@example(rows=[[1, 2, 3, 9, 2, 3, 8, 1, 2, 3]], max_drafts=2)
def test_against_search(rows: list[list[int]], max_drafts: int) -> None:
    history = torch.full((len(rows), WIDTH), JUNK)
    for index, tokens in enumerate(rows):
        history[index, : len(tokens)] = torch.tensor(tokens)
    before = history.clone()
    tokens, counts = ngram_lookup(history, torch.tensor([len(row) for row in rows]), max_drafts)
    assert tokens.shape == (len(rows), max_drafts)
    for row, drafted, count in zip(rows, tokens.tolist(), counts.tolist(), strict=True):
        assert drafted[:count] == looked_up(row, max_drafts)
    assert torch.equal(history, before)
