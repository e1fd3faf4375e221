"""What the engine chooses to draft is what graphs of verifications were captured for."""

from __future__ import annotations

from specserve.runtime.step_graphs import MOST_VERIFIED
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS


def test_verifications_of_every_choice_are_graphs() -> None:
    assert MAX_AUTO_DRAFTS + 1 <= MOST_VERIFIED
