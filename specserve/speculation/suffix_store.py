"""Where texts of the past are kept so that the places where some tokens stood before are found at once.

A suffix tree of all texts would answer the same question with a node for each token and depth. Here texts are kept as
they are, in pages of PAGE tokens that are linked both ways, and each token's cell knows the cell where the ANCHORS[i]
tokens that end in it ended before, for each i: the hash chains of LZ77 compressors (Deutsch, RFC 1951, section 4). A
text grows in place; when all pages are used the oldest is taken. About 52 bytes a token, all of it numpy.

A *place* is page * PAGE + offset. Pages are numbered from 1 on for ever, so that a place whose page was taken since is
known to be gone; places below PAGE mean none. A place's *cell* is where it lies. Tokens are stored as token + 1, so
that 0 means none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]

PAGE = 64
ANCHORS = (2, 4, 8)  # lengths by which places are found; the longest may not exceed PAGE
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class Text:
    """A text that grows. Texts of different owners (not 0) never find each other. `last`: the place of its newest
    token."""

    owner: int
    last: int = 0


class TextStore:
    """Holds the newest tokens of all texts, `max_tokens` of them rounded down to pages times a power of 2."""

    def __init__(self, max_tokens: int) -> None:
        self._num_pages = 1 << max(1, max_tokens // PAGE).bit_length() - 1
        self._size = self._num_pages * PAGE
        cells, pages = self._size + PAGE, self._num_pages + 1  # the last page is empty for ever: that of no text
        self._tokens = np.zeros(cells, dtype=np.int32)
        self._before = np.zeros(pages, dtype=np.int64)  # first place of the text's page before; 0: none
        self._after = np.zeros(pages, dtype=np.int64)
        self._owner = np.zeros(pages, dtype=np.int64)
        self._newest_page = 0
        self._bits = max(8, self._size.bit_length() - 1)
        self._heads = np.zeros((len(ANCHORS), 1 << self._bits), dtype=np.int64)  # newest place of each hash
        self._earlier = np.zeros((len(ANCHORS), cells), dtype=np.int64)  # the one before, of each cell that has one

    @property
    def num_bytes(self) -> int:
        """All that it will ever take."""
        parts = (self._tokens, self._before, self._after, self._owner, self._heads, self._earlier)
        return sum(part.nbytes for part in parts)

    def append(self, texts: Sequence[Text], tokens: Sequence[Sequence[int]]) -> None:
        """Let texts grow by some tokens each."""
        claimed: list[int] = []
        for text, new in zip(texts, tokens, strict=True):
            self._claim(text, len(new), claimed)
        places = np.array(claimed, dtype=np.int64)
        values = np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=len(places)) + 1
        kept = places >= self._oldest_place  # of a text longer than the store the end stays
        places = places[kept]
        self._tokens[self._cells(places)] = values[kept]
        self._link(places)

    def owners(self, places: Ints) -> Ints:
        """Whose each place is; 0 where it is nobody's."""
        return self._owner[self._cells(places) // PAGE]

    def ahead(self, places: Ints, count: int) -> Tokens:
        """The `count` ≤ PAGE tokens after each of `places` [N]: [N, count], 0 where the text has none."""
        cells = self._cells(places)
        columns = (cells % PAGE)[:, None] + np.arange(1, count + 1)
        after = self._cells(self._after[cells // PAGE])
        page = np.where(columns < PAGE, (cells & -PAGE)[:, None], after[:, None])
        tokens: Tokens = self._tokens[page + columns % PAGE]
        return tokens

    def back(self, places: Ints, count: int) -> Tokens:
        """The `count` ≤ PAGE tokens that end at each of `places` [N], newest first: [N, count]; 0 before the text."""
        cells = self._cells(places)
        columns = (cells % PAGE)[:, None] - np.arange(count)
        before = self._cells(self._before[cells // PAGE])
        page = np.where(columns >= 0, (cells & -PAGE)[:, None], before[:, None])
        tokens: Tokens = self._tokens[page + columns % PAGE]
        return tokens

    def matching(self, places: Ints, others: Ints, count: int) -> Ints:
        """How many tokens that end at `places` [N] also end at `others` [N], `count` at most: [N]; 0 where these are
        another owner's."""
        newest = self.back(places, count)
        differs = (newest != self.back(others, count)) | (newest == 0)
        lengths = np.where(differs.any(1), differs.argmax(1), count)
        return np.where(self.owners(places) == self.owners(others), lengths, 0)

    def found(self, places: Ints, count: int) -> Ints:
        """Up to `count` other places for each of `places` [B] where the tokens that end there may have ended and gone
        on, newest first: [B, count], 0 for none. By the longest anchor that finds one; whoever asks compares, for
        places of equal hashes are among them."""
        rows, newest, owners = np.arange(len(places)), self.back(places, ANCHORS[-1]), self.owners(places)
        heads = np.stack(
            [heads[self._hash(newest[:, :n], owners)] for n, heads in zip(ANCHORS, self._heads, strict=True)]
        )
        lengths = self.matching(np.tile(places, len(ANCHORS)), heads.reshape(-1), ANCHORS[-1]).reshape(heads.shape)
        agrees = lengths >= np.array(ANCHORS)[:, None]
        level = np.where(agrees, np.arange(len(ANCHORS))[:, None], -1).max(0)  # [B]
        place = np.where(level >= 0, heads[level, rows], 0)
        result = np.zeros((len(places), count), dtype=np.int64)
        for step in range(count):
            if not place.any():
                break
            result[:, step] = place
            place = self._earlier[level, self._cells(place)]
        return result

    def holds(self, owner: int, tokens: Sequence[int], tries: int) -> bool:
        """Whether these tokens, ANCHORS[-1] … PAGE of them, stand in a text of the owner; looked for at the newest
        `tries` places where their last ones may stand."""
        newest = np.array(tokens[::-1], dtype=np.int32)[None] + 1
        place = self._heads[-1, self._hash(newest[:, : ANCHORS[-1]], np.array([owner]))]
        for _ in range(tries):
            if self.owners(place)[0] == owner and (self.back(place, len(tokens)) == newest).all():
                return True
            place = self._earlier[-1, self._cells(place)]
        return False

    def _claim(self, text: Text, count: int, claimed: list[int]) -> None:
        """Add the places of a text's next `count` tokens."""
        while count > 0:
            first = text.last + 1
            if first % PAGE == 0 or text.last < self._oldest_place:
                first = self._open_page(text)
            size = min(count, PAGE - first % PAGE)
            claimed.extend(range(first, first + size))
            text.last = first + size - 1
            count -= size

    def _open_page(self, text: Text) -> int:
        """The oldest page becomes the text's newest: its first place."""
        old = text.last & -PAGE
        self._newest_page += 1
        first, page = self._newest_page * PAGE, self._newest_page % self._num_pages
        self._tokens[page * PAGE : (page + 1) * PAGE] = 0
        self._before[page], self._after[page], self._owner[page] = old, 0, text.owner
        if old >= self._oldest_place:
            self._after[old % self._size // PAGE] = first
        return first

    @property
    def _oldest_place(self) -> int:
        return max(1, self._newest_page - self._num_pages + 1) * PAGE

    def _cells(self, places: Ints) -> Ints:
        """Where places lie; those that are gone, on the empty page."""
        return np.where(places >= self._oldest_place, places & (self._size - 1), self._size)

    def _link(self, places: Ints) -> None:
        """Make the places before new tokens findable: now they have gone on. Those that have not would only hide others
        that have, of requests that write the same side by side."""
        before = self._before[self._cells(places) // PAGE] + PAGE - 1
        places = np.where(places % PAGE > 0, places - 1, before)
        places = places[places >= self._oldest_place]
        cells, owners = self._cells(places), self.owners(places)
        newest = self.back(places, ANCHORS[-1])  # [N, longest]
        for index, anchor in enumerate(ANCHORS):
            code = np.where(newest[:, anchor - 1] > 0, self._hash(newest[:, :anchor], owners), 0)  # 0: too short yet
            order = np.argsort(code, kind="stable")
            code, place = code[order], places[order]
            previous = self._heads[index, code]
            again = code[1:] == code[:-1]
            previous[1:][again] = place[:-1][again]
            previous[code == 0] = 0
            self._earlier[index, cells[order]] = previous
            self._heads[index, code] = place  # of equal codes the last stays

    def _hash(self, grams: Tokens, owners: Ints) -> Ints:
        """[N, anchor], [N] → 1 … 2 ** bits - 1."""
        code = owners.astype(np.uint64)
        for column in grams.T:
            code = (code ^ column.astype(np.uint64)) * MULTIPLIER
        hashed: Ints = np.maximum(code >> np.uint64(64 - self._bits), np.uint64(1)).astype(np.int64)
        return hashed
