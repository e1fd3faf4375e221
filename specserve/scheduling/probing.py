"""Probing: a small, bounded share of the time goes to learning what the choice of drafts would otherwise not see.

Rows whose key gets no drafts say nothing about their acceptance, and a batch that always drafts says nothing about a
step without. So each millisecond of steps earns SHARE of a millisecond, and a probe is made when its whole price has
been earned: the longer step, and the draft's prefill that it needs first. What was saved up lets a probe be dear, not
probes be many: the next one waits until its price is earned anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from specserve.scheduling.acceptance import Estimate
from specserve.scheduling.drafts import draft_gap
from specserve.scheduling.request import Request

SHARE = 0.005
MOST_SAVED = 250.0  # milliseconds: no more can be spent at once
PROBE_DRAFTS = 2  # a row
PROBE_ROWS = 4  # a step: they share the price of a pass

FADE = 1.0 / 25.0  # of what is known of a key, by each probe: few should do to learn that a text has changed

Price = Callable[[Mapping[str, int], Mapping[str, int]], float]
"""Milliseconds that a step takes longer for (rows by proposer, tokens of draft prefill by proposer)."""


class _Candidate(NamedTuple):
    last_probe: int
    gap: int
    request: Request
    estimate: Estimate


class Probing:
    """`probes`: rows that were probed; `spent`: milliseconds that all this took, as the table has it."""

    def __init__(self, draft_kv: Mapping[str, bool]) -> None:
        self.probes = 0
        self.spent = 0.0
        self._draft_kv = draft_kv
        self._saved = 0.0
        self._wanted = 0.0  # what the next probe costs at least: until then nobody looks
        self._rest = 0.0  # of the last price, not earned anew yet: until then nothing is bought

    def earn(self, milliseconds: float) -> None:
        """A step took so long."""
        self._saved = min(MOST_SAVED, self._saved + SHARE * milliseconds)
        self._rest = max(0.0, self._rest - SHARE * milliseconds)

    def buy(self, price: float) -> bool:
        """Pay for something that is learnt in another way, if there is enough or it costs nothing."""
        if price > 0.0 and (price > self._saved or self._rest):
            return False
        self._pay(price)
        return True

    def _pay(self, price: float) -> None:
        price = max(0.0, price)
        self._saved -= price
        self._rest += price
        self.spent += price
        self._wanted = 0.0

    def pick(self, requests: Iterable[Request], price: Price) -> list[Request]:
        """Of requests that get no drafts, those to be probed in this step: first whose key was not probed for longest,
        then who needs least draft prefill."""
        if self._saved < self._wanted or self._rest:
            return []
        candidates = sorted(self._candidates(requests), key=lambda one: one[:2])
        picked: list[_Candidate] = []
        cost = 0.0
        for candidate in _in_turns(candidates)[:PROBE_ROWS]:
            more = price(*_amounts([*picked, candidate]))
            if more > self._saved:
                if not picked:
                    self._wanted = min(more, MOST_SAVED)
                break
            picked.append(candidate)
            cost = more
        if picked:
            self._pay(cost)
            self.probes += len(picked)
        for candidate in picked:
            candidate.estimate.last_probe = self.probes
            candidate.estimate.fade(FADE)
        return [candidate.request for candidate in picked]

    def _candidates(self, requests: Iterable[Request]) -> Iterable[_Candidate]:
        for request in requests:
            estimate = request.estimate
            if estimate is None or request.tokens_left <= PROBE_DRAFTS:
                continue
            gap = draft_gap(request) if self._draft_kv[estimate.key.proposer] else 0
            yield _Candidate(estimate.last_probe, gap, request, estimate)


def _in_turns(candidates: list[_Candidate]) -> list[_Candidate]:
    """One row of each key, then a second one of each, and so on; the first PROBE_ROWS are enough."""
    turns: dict[int, int] = {}
    ranked = []
    for place, candidate in enumerate(candidates):
        turn = turns.get(id(candidate.estimate), 0)
        turns[id(candidate.estimate)] = turn + 1
        if turn < PROBE_ROWS:
            ranked.append((turn, place, candidate))
    return [candidate for _, _, candidate in sorted(ranked, key=lambda one: one[:2])]


def _amounts(candidates: list[_Candidate]) -> tuple[dict[str, int], dict[str, int]]:
    rows: dict[str, int] = {}
    gaps: dict[str, int] = {}
    for candidate in candidates:
        name = candidate.estimate.key.proposer
        rows[name] = rows.get(name, 0) + 1
        gaps[name] = gaps.get(name, 0) + candidate.gap
    return rows, gaps
