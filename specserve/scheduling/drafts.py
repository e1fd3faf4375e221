"""What of the wanted drafts fits a row, and how much of the draft model's KV must be caught up first.

Plain arithmetic over a Request; the scheduler asks once a row and step. How many are wanted where the request does not
say is the DraftPolicy's affair.
"""

from __future__ import annotations

from typing import NamedTuple

from specserve.scheduling.request import Request

# The first draft pass reads the last two committed tokens, so the draft's KV must reach up to there.
DRAFT_LAG = 2


class DraftChoice(NamedTuple):
    """`num_drafts` tokens to draft and verify, after `catch_up` known tokens of draft prefill."""

    num_drafts: int
    catch_up: int


NO_DRAFTS = DraftChoice(0, 0)


def draft_gap(request: Request) -> int:
    """Known tokens that the draft's KV lacks before it can draft.

    A drafting step in flight leaves no gap whatever it accepts; steps in flight without drafts add one token each.
    """
    if request.in_flight_bound > request.num_in_flight_sampling:
        return 0
    known = request.num_tokens + request.num_in_flight_sampling
    return max(0, known - DRAFT_LAG - request.num_draft_scheduled_tokens)


def choose_drafts(request: Request, spare: int, *, auto: int, draft_kv: bool) -> DraftChoice:
    """Drafts for a decode row, which with its draft prefill may take `spare` tokens beside the row's own. A request
    that asked for no number gets `auto`.

    Nothing is drafted that could not be emitted, and drafting waits until the draft's KV is caught up.
    """
    asked = auto if request.num_draft_tokens is None else request.num_draft_tokens
    wanted = min(asked, request.tokens_left - 1)
    if wanted <= 0 or spare <= 0:
        return NO_DRAFTS
    gap = draft_gap(request) if draft_kv else 0
    if gap >= spare:
        return DraftChoice(0, spare)
    return DraftChoice(min(wanted, spare - gap), gap)
