"""SuffixDecoding against a search in plain Python, and what its store keeps, forgets and never mixes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specserve.speculation.suffix import MAX_PATTERN, OCCURRENCES, SuffixProposer
from specserve.speculation.suffix_paths import ALPHA, MIN_SHARE
from specserve.speculation.suffix_store import ANCHORS, PAGE, TextStore

KEYS = (b"0123456789abcdef", b"another adapter!")


class Books:
    """The same by lists: every text, and all places that were gone on from, in that order."""

    def __init__(self) -> None:
        self.keys: dict[str, bytes] = {}
        self.texts: dict[str, list[int]] = {}
        self.gone_on: list[tuple[str, int]] = []

    def add(self, name: str, key: bytes, tokens: list[int]) -> None:
        self.keys[name] = key
        text = self.texts.setdefault(name, [])
        self.gone_on += [(name, end) for end in range(max(0, len(text) - 1), len(text) + len(tokens) - 1)]
        text += tokens

    def match(self, name: str, place: tuple[str, int]) -> int:
        own, other = self.texts[name][::-1], self.texts[place[0]][place[1] :: -1]
        length = 0
        while length < min(MAX_PATTERN, len(own), len(other)) and own[length] == other[length]:
            length += 1
        return length

    def draft(self, name: str, limit: int) -> list[int]:
        """Longest anchor first; its newest places vote, for each pattern length on its own."""
        places = [place for place in reversed(self.gone_on) if self.keys[place[0]] == self.keys[name]]
        matches = [(self.match(name, place), place) for place in places]
        longest = max((length for length, _ in matches), default=0)
        anchor = max((anchor for anchor in ANCHORS if anchor <= longest), default=None)
        if anchor is None:
            return []
        matches = [match for match in matches if match[0] >= anchor][:OCCURRENCES]
        matches.sort(key=lambda match: -match[0])
        found = [self.path([m for m in matches if m[0] >= p], min(limit, ALPHA * p)) for p, _ in matches]
        return max(found, key=lambda scored: scored[0])[1]  # the first, so the longest, of equal scores

    def path(self, voters: list[tuple[int, tuple[str, int]]], bound: int) -> tuple[float, list[int]]:
        path: list[int] = []
        share, score = 1.0, 0.0
        follows = [self.texts[name][end + 1 :] for _, (name, end) in voters]
        while len(path) < bound:
            follows = [text for text in follows if len(text) > len(path) and text[: len(path)] == path]
            votes = [text[len(path)] for text in follows]
            if not votes:
                break
            token, number = Counter(votes).most_common(1)[0]  # of equal ones the first that voted
            share *= number / len(votes)
            if share < MIN_SHARE:
                break
            score += share
            path.append(token)
        return score, path


def perfect_hash(store: TextStore, grams: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """A code of its own for each gram and owner."""
    codes = store.__dict__.setdefault("codes", {})
    keys = [(*gram, owner) for gram, owner in zip(grams.tolist(), owners.tolist(), strict=True)]
    return np.array([codes.setdefault(key, len(codes) + 1) for key in keys], dtype=np.int64)


additions = st.lists(
    st.tuples(st.sampled_from("abcd"), st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 6)),
    min_size=1,
    max_size=14,
)


def drafts(proposer: SuffixProposer, names: list[str], limits: list[int]) -> list[list[int]]:
    tokens, counts = proposer.draft(names, np.array(limits))
    assert all(row[count:] == [0] * (len(row) - count) for row, count in zip(tokens.tolist(), counts, strict=True))
    return [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


@settings(max_examples=200, deadline=None)
@given(additions=additions, shared=st.booleans())
def test_against_search(additions: list[tuple[str, list[int], int]], shared: bool) -> None:
    """Texts of one key or two grow by turns; after some additions all of them draft."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextStore, "_hash", perfect_hash)
        proposer, books = SuffixProposer(1 << 14), Books()
        for name, tokens, limit in additions:
            key = KEYS[0] if shared or name in "ab" else KEYS[1]
            if name in books.texts:
                proposer.extend(name, tokens)
            else:
                proposer.begin(name, key, tokens, 0)
            books.add(name, key, tokens)
            if limit:
                names = sorted(books.texts)
                limits = [1 + (limit + index) % 9 for index in range(len(names))]
                wanted = [books.draft(*asked) for asked in zip(names, limits, strict=True)]
                assert drafts(proposer, names, limits) == wanted


def test_a_long_match_is_found_however_common_its_end_is() -> None:
    proposer = SuffixProposer()
    text = [*range(100, 120), 7, 8]
    proposer.begin("old", KEYS[0], [*text, 1, 2, 3, 4], 0)
    proposer.begin("noise", KEYS[0], [token for index in range(200) for token in (7, 8, 500 + index)], 0)
    proposer.begin("new", KEYS[0], text, 0)
    assert drafts(proposer, ["new"], [4]) == [[1, 2, 3, 4]]


def test_the_frequent_continuation_is_drafted() -> None:
    proposer = SuffixProposer()
    for index, after in enumerate([[5, 6], [9, 9], [5, 7], [5, 6]]):
        proposer.begin(str(index), KEYS[0], [1, 2, 3, *after, 100 + index], 0)
    proposer.begin("new", KEYS[0], [1, 2, 3], 0)
    assert drafts(proposer, ["new"], [2]) == [[5, 6]]


def test_no_key_is_drafted_for_by_another() -> None:
    """Whatever the hashes do: the store is so small that they collide all the time."""
    proposer = SuffixProposer(256)
    texts = {key: [number, *[number + 2 * (i * i % 11) for i in range(120)]] for number, key in enumerate(KEYS)}
    for turn in range(6):
        for key, text in texts.items():
            name = f"{turn} {key!r}"
            proposer.begin(name, key, text[:60], 0)
            proposer.begin("lost", key, texts[KEYS[turn % 2]][:50], 0)  # tokens of either
            proposer.end("lost")
            parity = text[0] % 2
            found = drafts(proposer, [name], [8])[0]
            if turn % 2 == parity:
                assert all(token % 2 == parity for token in found)
            proposer.extend(name, text[60:])
            proposer.end(name)
    proposer = SuffixProposer()
    proposer.begin("a", KEYS[0], [1, 2, 3, 4, 5, 6], 0)
    proposer.begin("b", KEYS[1], [1, 2, 3], 0)
    proposer.begin("c", KEYS[0], [1, 2, 3], 0)
    assert drafts(proposer, ["b", "c"], [3, 3]) == [[], [4, 5, 6]]


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    proposer = SuffixProposer(16 * PAGE)
    size = proposer.store.num_bytes
    for index in range(100):
        proposer.begin(str(index), KEYS[0], list(range(1000 * index, 1000 * index + 2 * PAGE)), 0)
        proposer.end(str(index))

    def knows(index: int) -> bool:
        proposer.begin("asks", KEYS[0], list(range(1000 * index, 1000 * index + 10)), 0)
        return drafts(proposer, ["asks"], [3]) == [[1000 * index + 10 + j for j in range(3)]]

    assert [index for index in range(99, 80, -1) if knows(index)] == [99, 98, 97, 96, 95]  # each question takes a page
    proposer.begin("long", KEYS[0], [index % 50 for index in range(40 * PAGE)], 0)
    assert drafts(proposer, ["long"], [3]) == [[index % 50 for index in range(40 * PAGE, 40 * PAGE + 3)]]
    assert proposer.store.num_bytes == size
    assert not knows(99)
    proposer.end("long")
    proposer.end("asks")
    assert not proposer._texts


def test_a_beginning_that_is_stored_is_not_stored_again() -> None:
    """Fifty requests with one long prompt leave room for what came before them; each still finds its own prompt."""
    proposer = SuffixProposer(128 * PAGE)
    proposer.begin("old", KEYS[0], list(range(5000, 5100)), 0)
    shared = [(index * index) % 997 for index in range(20 * PAGE)]
    for index in range(50):
        proposer.begin(str(index), KEYS[0], [*shared, 2000 + index], 0 if index == 0 else len(shared))
        proposer.extend(str(index), shared[100:110])
        assert drafts(proposer, [str(index)], [4]) == [shared[110:114]]
        proposer.end(str(index))
    proposer.begin("new", KEYS[0], list(range(5000, 5010)), 0)
    assert drafts(proposer, ["new"], [2]) == [[5010, 5011]]
    proposer.begin("other", KEYS[1], [*shared, 1], len(shared))  # what one key holds is not held by another
    proposer.extend("other", shared[100:110])
    assert drafts(proposer, ["other"], [4]) == [shared[110:114]]


def test_requests_side_by_side_do_not_hide_what_came_before() -> None:
    proposer = SuffixProposer()
    text = [index % 17 + 20 * (index % 5) for index in range(60)]
    proposer.begin("old", KEYS[0], text, 0)
    names = [str(index) for index in range(3 * OCCURRENCES)]
    for name in names:
        proposer.begin(name, KEYS[0], text[:30], 0)
    assert drafts(proposer, names, [3] * len(names)) == [text[30:33]] * len(names)


def test_rows_do_not_depend_on_each_other() -> None:
    proposer = SuffixProposer()
    names = [str(index) for index in range(12)]
    for index, name in enumerate(names):
        proposer.begin(name, KEYS[index % 2], [(j * j + index // 4) % 13 for j in range(50 + index)], 0)
    limits = [1 + index % 6 for index in range(12)]
    alone = [drafts(proposer, [name], [limit])[0] for name, limit in zip(names, limits, strict=True)]
    assert drafts(proposer, names, limits) == alone
    assert any(alone)
