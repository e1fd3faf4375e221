"""SuffixDecoding: drafts are what followed in earlier texts where the newest tokens stood before (Oliaro et al. 2024,
"SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", arXiv 2411.04975).

As there, places where the newest tokens stood vote on what follows (`suffix_paths.py`). Unlike there, only the newest
OCCURRENCES places vote, and a request's own text votes together with others: one store (`suffix_store.py`) holds them
all, in bounded memory, the oldest of whatever key giving way first.

On the host, in numpy over all rows at once. A request is drafted for by texts of its own key alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from specserve.device import upload
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve.speculation.suffix_paths import ALPHA, Matches, best_paths
from specserve.speculation.suffix_store import ANCHORS, PAGE, Ints, Text, TextStore

MAX_TOKENS = 1 << 20  # of all texts that are remembered
MAX_PATTERN = 16
OCCURRENCES = 12
MAX_PENDING = 4096  # tokens that wait to be stored until the next draft


class SuffixProposer:
    """Drafts what texts of the same key said next: prompts and outputs, past and running, its own among them."""

    name = "suffix"
    location: Literal["device", "host"] = "host"
    keeps_kv = False

    def __init__(self, max_tokens: int = MAX_TOKENS) -> None:
        self.store = TextStore(max_tokens)
        self._texts: dict[str, Text] = {}
        self._pending: list[tuple[Text, Sequence[int]]] = []
        self._num_pending = 0

    def begin(self, request_id: str, key: bytes, token_ids: Sequence[int], num_seen: int) -> None:
        """A beginning that is stored already is not stored again, but for the tokens that what follows is found by:
        a prompt that many requests share, or a conversation's turns so far."""
        text = self._texts[request_id] = Text(int.from_bytes(key[:8], "little", signed=True) or 1)
        self._store_pending()
        stored = num_seen >= 2 * PAGE and self._holds(text.owner, token_ids[:num_seen])
        self._add(text, token_ids[num_seen - MAX_PATTERN if stored else 0 :])

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        self._add(self._texts[request_id], token_ids)

    def end(self, request_id: str) -> None:
        self._texts.pop(request_id, None)

    def propose(self, batch: DraftBatch) -> Drafts:
        limits = np.array(batch.num_drafts, dtype=np.int64)
        path, counts = self.draft(batch.request_ids, limits)
        tokens = np.zeros((len(limits), batch.max_drafts), dtype=np.int64)
        tokens[:, : path.shape[1]] = path
        device = batch.limits.device
        return Drafts(upload(tokens, device), upload(counts, device))

    def draft(self, request_ids: Sequence[str], limits: Ints) -> tuple[Ints, Ints]:
        """(tokens [B, K], counts [B]) for requests that have begun; K is no more than the largest limit."""
        self._store_pending()
        last = np.array([self._texts[request_id].last for request_id in request_ids], dtype=np.int64)
        places = self.store.found(last, OCCURRENCES)
        row, column = np.nonzero(places)
        found = places[row, column]
        lengths = self.store.matching(last[row], found, MAX_PATTERN)
        agree = lengths >= ANCHORS[0]
        row, found, lengths = row[agree], found[agree], lengths[agree]
        ahead = self.store.ahead(found, min(int(limits.max()), ALPHA * MAX_PATTERN))
        return best_paths(Matches(row, lengths, ahead), limits)

    def _holds(self, owner: int, token_ids: Sequence[int]) -> bool:
        """Whether a text that was seen is still there: its first page is what gives way first, and its end is what
        another text with the same beginning may lack."""
        parts = token_ids[:PAGE], token_ids[-MAX_PATTERN:]
        return all(self.store.holds(owner, part, OCCURRENCES) for part in parts)

    def _add(self, text: Text, token_ids: Sequence[int]) -> None:
        self._pending.append((text, token_ids))
        self._num_pending += len(token_ids)
        if self._num_pending > MAX_PENDING:
            self._store_pending()

    def _store_pending(self) -> None:
        if self._pending:
            texts, tokens = zip(*self._pending, strict=True)
            self.store.append(texts, tokens)
            self._pending, self._num_pending = [], 0
