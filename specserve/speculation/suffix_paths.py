"""Which continuation of the newest tokens is best, by the votes of places where they stood before.

For each length p of the pattern (how many of the newest tokens a place must agree with to vote) a path is drafted: each
token is the most frequent one among the votes that agree with the path so far, and D(token) = D(its parent) · (its
share of those votes) estimates how likely it is. A path ends after α · p tokens, or where D falls below MIN_SHARE. Its
score Σ D is how many of its tokens one expects to be accepted (Oliaro et al. 2024, arXiv 2411.04975, section 4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specserve.speculation.suffix_store import Ints, Tokens

ALPHA = 1
MIN_SHARE = 0.1


class Matches(NamedTuple):
    """N places where a row's newest tokens stood before: `row` [N], `lengths` [N] > 0 (how many of the tokens stood
    there), `ahead` [N, K] token + 1 (what followed; 0: not known). A row's places come newest first."""

    row: Ints
    lengths: Ints
    ahead: Tokens

    def ordered(self) -> Matches:
        """By row, the longest first."""
        order = np.lexsort((-self.lengths, self.row))
        return Matches(self.row[order], self.lengths[order], self.ahead[order])


def best_paths(matches: Matches, limits: Ints) -> tuple[Ints, Ints]:
    """The best-scored path of each of B rows: tokens [B, K] (0 past the count) and counts [B] ≤ limits [B].

    Ties go to the longer pattern, and among a pattern's votes to the longer match, then to the newer place.
    """
    depth = matches.ahead.shape[1]
    tokens, counts = np.zeros((len(limits), depth), dtype=np.int64), np.zeros(len(limits), dtype=np.int64)
    if not len(matches.row):
        return tokens, counts
    matches = matches.ordered()
    pattern, votes = _patterns(matches)
    row = matches.row[pattern]
    bounds = np.minimum(limits[row], ALPHA * matches.lengths[pattern])
    paths, found, score = _paths(matches.ahead[votes.place], votes.valid, bounds)
    order = np.lexsort((-score, row))  # stable: of equal scores the longer pattern comes first
    best = order[_starts(row[order])]
    tokens[row[best]], counts[row[best]] = paths[best], found[best]
    return tokens, counts


class Votes(NamedTuple):
    """`place` [P, M] of each pattern, among the matches; `valid` [P, M]."""

    place: Ints
    valid: NDArray[np.bool_]


def _patterns(matches: Matches) -> tuple[Ints, Votes]:
    """P patterns, one for each row and length: the first match of each, and who votes: the row's matches up to the last
    one of that length."""
    new_row = _starts(matches.row)
    starts = _starts(matches.row, matches.lengths)
    first = new_row[np.searchsorted(new_row, starts, side="right") - 1]  # [P] of the row
    ends = np.append(starts[1:], len(matches.row))
    place = first[:, None] + np.arange((ends - first).max())
    valid = place < ends[:, None]
    return starts, Votes(np.where(valid, place, 0), valid)


def _starts(*keys: NDArray[Any]) -> Ints:
    """Where runs of equal keys begin."""
    changes = np.zeros(len(keys[0]), dtype=np.bool_)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changes)


def _paths(ahead: Tokens, votes: NDArray[np.bool_], bounds: Ints) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """ahead [P, M, K], votes [P, M], bounds [P] → paths [P, K], how many tokens each has [P], and scores [P]."""
    num_patterns, _, depth = ahead.shape
    paths, counts = np.zeros((num_patterns, depth), dtype=np.int64), np.zeros(num_patterns, dtype=np.int64)
    share, score = np.ones(num_patterns), np.zeros(num_patterns)  # share: D of the newest token
    for step in range(depth):
        token, votes, part = _most_frequent(ahead[:, :, step], votes)
        share = share * part
        goes_on = (share >= MIN_SHARE) & (step < bounds) & (counts == step)
        if not goes_on.any():
            break
        score += share * goes_on
        counts += goes_on
        paths[:, step] = np.where(goes_on, token - 1, 0)
    return paths, counts, score


def _most_frequent(tokens: Tokens, votes: NDArray[np.bool_]) -> tuple[Tokens, NDArray[np.bool_], NDArray[np.float64]]:
    """votes [P, M] on next tokens [P, M] (0: not known): the winner of each pattern [P], the votes that it got [P, M]
    and their share of all [P], 0 where nobody knows."""
    votes = votes & (tokens > 0)
    same = tokens[:, :, None] == tokens[:, None, :]  # [P, M, M]
    same &= votes[:, None, :]
    support = np.count_nonzero(same, axis=2) * votes  # [P, M]: how many vote as each place does
    winner, pattern = support.argmax(1), np.arange(len(tokens))
    token = tokens[pattern, winner]
    part = support[pattern, winner] / np.maximum(np.count_nonzero(votes, axis=1), 1)
    return token, votes & (tokens == token[:, None]), part
