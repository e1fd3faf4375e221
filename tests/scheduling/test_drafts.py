"""How many tokens are drafted: by the request's word, by the choice, by what fits."""

from __future__ import annotations

from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.drafts import DraftChoice, choose_drafts
from specserve.scheduling.request import Request


def request(num_draft_tokens: int | None, *, num_tokens: int = 20, draft_computed: int = 18, left: int = 50) -> Request:
    return Request(
        request_id="a",
        prompt_len=10,
        token_ids=[1] * num_tokens,
        params=SamplingParams(),
        seed=0,
        stop_ids=(),
        max_total=num_tokens + left,
        num_draft_tokens=num_draft_tokens,
        num_draft_scheduled_tokens=draft_computed,
    )


def test_a_request_that_names_a_number_gets_it_under_any_load() -> None:
    assert choose_drafts(request(7), 100, auto=0, draft_kv=True) == DraftChoice(7, 0)
    assert choose_drafts(request(None), 100, auto=2, draft_kv=True) == DraftChoice(2, 0)
    assert choose_drafts(request(None), 100, auto=0, draft_kv=True) == DraftChoice(0, 0)
    assert choose_drafts(request(0), 100, auto=4, draft_kv=True) == DraftChoice(0, 0)


def test_nothing_is_drafted_that_could_not_be_emitted() -> None:
    assert choose_drafts(request(7, left=3), 100, auto=4, draft_kv=True) == DraftChoice(2, 0)
    assert choose_drafts(request(7, left=1), 100, auto=4, draft_kv=True) == DraftChoice(0, 0)


def test_the_gap_in_the_drafts_kv_comes_first_and_out_of_the_same_tokens() -> None:
    behind = request(4, draft_computed=8)
    assert choose_drafts(behind, 100, auto=4, draft_kv=True) == DraftChoice(4, 10)
    assert choose_drafts(behind, 12, auto=4, draft_kv=True) == DraftChoice(2, 10)
    assert choose_drafts(behind, 6, auto=4, draft_kv=True) == DraftChoice(0, 6)
    assert choose_drafts(behind, 6, auto=4, draft_kv=False) == DraftChoice(4, 0)
