"""Forbidden token sequences against a search in plain Python, position by position."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specserve_kernels.sampling.bad_words import ANY, forbid_words_ref

VOCAB, WIDTH, NUM_DRAFTS = 4, 12, 3
JUNK = 1  # what stands past a row's tokens: a likely token, so that reading it would show
Word = tuple[int, ...]


class Row(NamedTuple):
    """One request: its text so far, what is drafted behind it, and what it must not say."""

    prompt: list[int]
    output: list[int]
    drafts: list[int]
    words: list[Word]


def forbidden_after(generated: list[int], words: list[Word]) -> set[int]:
    return {word[-1] for word in words if tuple(generated[len(generated) - len(word) + 1 :]) == word[:-1]
            and len(generated) >= len(word) - 1}  # fmt: skip


tokens = st.integers(0, VOCAB - 2)  # so that some token always stays
rows = st.builds(
    Row,
    prompt=st.lists(tokens, min_size=1, max_size=4),
    output=st.lists(tokens, max_size=5),
    drafts=st.lists(tokens, min_size=NUM_DRAFTS, max_size=NUM_DRAFTS),
    words=st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=5),
)


@settings(max_examples=300, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=4), num_positions=st.integers(1, NUM_DRAFTS + 1))
@example(batch=[Row([0, 1], [], [2, 0, 1], [(0, 1, 2)])], num_positions=4)  # begins in the prompt: not completed
@example(batch=[Row([0], [0, 1], [2, 0, 1], [(0, 1, 2), (0, 1, 0), (1, 2)])], num_positions=4)  # shared beginnings
@example(batch=[Row([0], [], [1, 1, 1], [(1, 1, 1, 1), (1, 1, 1, 2)])], num_positions=4)  # in drafts alone
@example(batch=[Row([0], [], [1, 1, 1], [(2,), (2,)])], num_positions=1)
def test_against_search(batch: list[Row], num_positions: int) -> None:
    """The batch's rows are the device's in another order; the positions are the last of those after 0 to D drafts."""
    count = len(batch)
    all_words = [word for row in batch for word in row.words]
    longest = max(map(len, all_words), default=1)
    words = torch.tensor([[ANY] * (longest - len(word)) + list(word) for word in all_words]).view(-1, longest).long()
    owners = torch.tensor([index for index, row in enumerate(batch) for _ in row.words], dtype=torch.int64)
    places = torch.tensor([count - index for index in range(count)])
    history = torch.full((count + 1, WIDTH), JUNK)
    for place, row in zip(places.tolist(), batch, strict=True):
        text = row.prompt + row.output
        history[place, : len(text)] = torch.tensor(text)
    starts = torch.tensor([len(row.prompt) for row in batch])
    lengths = torch.tensor([len(row.prompt) + len(row.output) for row in batch])
    drafts = torch.tensor([row.drafts for row in batch])
    logits = torch.randn(count, num_positions, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = logits.clone()
    found = forbid_words_ref(logits, drafts, words, owners, history, places, starts, lengths)
    for index, row in enumerate(batch):
        for position in range(num_positions):
            generated = row.output + row.drafts[: NUM_DRAFTS + 1 - num_positions + position]
            expected = before[index, position].clone()
            expected[list(forbidden_after(generated, row.words))] = -torch.inf
            assert torch.equal(found[index, position], expected), (row, position)
    assert torch.equal(logits, before)
