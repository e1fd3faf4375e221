"""Whose draft prefill pays.

A row whose draft KV lies behind must be caught up before it can draft. That is paid for in advance, and drafting gives
it back token by token; so it is judged more soberly than the choice of drafts is, which costs a step at a time: what
drafting saves must be likely, not only hoped, and counts as far as it goes beyond a margin (draft_policy.py tells what
that stands for).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from specserve.scheduling.acceptance import Estimate
from specserve.scheduling.draft_choice import Group, StepCosts, evaluate
from specserve.scheduling.drafts import draft_gap
from specserve.scheduling.request import Request

HORIZON = 512  # tokens that an answer may be expected to go on for; one that is longer, as long again
KNOWN = 16  # rounds of a key, until more than a few of its rows pay for draft prefill …
TRIED_ROWS, TRIED_DRAFTS = 4, 1  # … these few, and their drafts: a second one takes another pass and tells little
MARGIN = 1.03  # times the tokens a millisecond of a step without drafts: what drafting saves begins there
PAYS, PAYS_IF_HOPED = 1.3, 4.0  # times draft prefill's price that drafting must save, probably or with luck


class Saving(NamedTuple):
    """Milliseconds a token that drafting saves beyond a margin, as things probably are and as may be hoped; negative:
    it costs some."""

    likely: float
    hoped: float

    @classmethod
    def of(cls, counts: Mapping[Estimate, int], drafts: Sequence[int], costs: StepCosts) -> Saving:
        """What so many drafts of rows, by key, save in a step."""
        likely = [Group(estimate.key.proposer, estimate.likely, rows) for estimate, rows in counts.items()]
        hoped = [Group(estimate.key.proposer, estimate.refresh(), rows) for estimate, rows in counts.items()]
        return cls(_saved(likely, drafts, costs), _saved(hoped, drafts, costs))

    def and_also(self, other: Saving) -> Saving:
        """The lesser of each."""
        return Saving(min(self.likely, other.likely), min(self.hoped, other.hoped))

    @property
    def worth(self) -> float:
        """Milliseconds of draft prefill that each token to come is worth."""
        return max(self.likely / PAYS, self.hoped / PAYS_IF_HOPED)


def _saved(groups: Sequence[Group], drafts: Sequence[int], costs: StepCosts) -> float:
    none, some = evaluate(groups, (0,) * len(groups), costs), evaluate(groups, drafts, costs)
    return none.milliseconds / none.worth / MARGIN - some.milliseconds / some.worth


def unpaid(gaps: Mapping[Request, int], saving: Saving, prices: Mapping[str, float]) -> set[Request]:
    """Of rows that lie behind, by so many tokens, those whose draft prefill takes more than drafting is worth over the
    tokens that they have left. `prices`: milliseconds a token, by proposer."""
    worth = saving.worth
    if worth <= 0.0:
        return set(gaps)
    found = set()
    for request, gap in gaps.items():
        assert request.proposer is not None
        expected = min(request.tokens_left, max(HORIZON, request.num_output_tokens))
        if gap * prices[request.proposer] > worth * expected:
            found.add(request)
    return found


def unknown(behind: Iterable[Request], lengths: Mapping[Estimate, int]) -> set[Estimate]:
    """Keys that are to draft, of which next to nothing is known, and of whose rows more than a few lie behind."""
    rows: dict[Estimate, int] = {}
    for request in behind:
        assert request.estimate is not None
        rows[request.estimate] = rows.get(request.estimate, 0) + 1
    return {key for key, count in rows.items() if count > TRIED_ROWS and lengths.get(key) and key.rounds < KNOWN}


def first_to_try(alike: Iterable[Request]) -> list[Request]:
    """Those few rows that draft to find out about all of a key, always the same ones: who is caught up is first."""
    return sorted(alike, key=draft_gap)[:TRIED_ROWS]
