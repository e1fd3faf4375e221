"""The n-gram lookup against a search in plain Python."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specserve_kernels.ngram import ngram_lookup_ref

WIDTH = 24
JUNK = 3  # what stands past a row's tokens: a likely token, so that reading it would show


def looked_up(tokens: list[int], max_drafts: int, min_ngram: int, max_ngram: int) -> list[int]:
    """Longest suffix first, latest earlier match first; what followed it."""
    for n in range(min(max_ngram, len(tokens)), min_ngram - 1, -1):
        for end in range(len(tokens) - 2, n - 2, -1):
            if tokens[end - n + 1 : end + 1] == tokens[-n:]:
                return tokens[end + 1 : end + 1 + max_drafts]
    return []


texts = st.lists(
    st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=WIDTH), st.integers(1, 8)), min_size=1, max_size=4
)


@settings(max_examples=300, deadline=None)
@given(texts=texts, lengths=st.sampled_from([(1, 3), (1, 1), (2, 4), (3, 3)]))
@example(texts=[([3], 4)], lengths=(1, 3))
@example(texts=[([3, 3, 3], 4)], lengths=(1, 3))
@example(texts=[([1] * WIDTH, 8), ([1, 2], 1)], lengths=(1, 3))
@example(texts=[([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 2)], lengths=(1, 3))
def test_against_search(texts: list[tuple[list[int], int]], lengths: tuple[int, int]) -> None:
    """The batch's rows are the device's in another order, with one between that has none of it."""
    count = len(texts)
    history = torch.full((count + 1, WIDTH), JUNK)
    num_tokens = torch.full((count + 1,), WIDTH)
    rows = torch.tensor([count - index for index in range(count)])
    for row, (tokens, _) in zip(rows.tolist(), texts, strict=True):
        history[row, : len(tokens)] = torch.tensor(tokens)
        num_tokens[row] = len(tokens)
    before = history.clone()
    limits = torch.tensor([limit for _, limit in texts])
    max_drafts = int(limits.max())
    found, counts = ngram_lookup_ref(history, num_tokens, rows, limits, max_drafts, *lengths)
    assert found.shape == (count, max_drafts)
    for (tokens, limit), drafted, number in zip(texts, found.tolist(), counts.tolist(), strict=True):
        assert drafted[:number] == looked_up(tokens, limit, *lengths)
        assert drafted[number:] == [0] * (max_drafts - number)
    assert torch.equal(history, before)
