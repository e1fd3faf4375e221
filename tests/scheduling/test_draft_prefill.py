"""Whose draft prefill pays: by what drafting probably saves, what it may save, and how little is known of it."""

from __future__ import annotations

import pytest

from schedkit.simulation import gpu_like
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.acceptance import AcceptanceKey, Estimate
from specserve.scheduling.cost_model import CostModel
from specserve.scheduling.draft_prefill import KNOWN, PAYS, TRIED_ROWS, Saving, first_to_try, unknown, unpaid
from specserve.scheduling.drafts import draft_gap
from specserve.scheduling.request import Request


def estimate(alpha: float, rounds: int) -> Estimate:
    found = Estimate(AcceptanceKey((), "greedy", "draft"), prior=alpha)
    for number in range(rounds):
        found.note(1, int(number * alpha) != int((number + 1) * alpha))
    found.refresh()
    return found


def request(name: str, *, behind: int, left: int = 200, key: Estimate | None = None) -> Request:
    known = 300
    made = Request(
        request_id=name, prompt_len=known, token_ids=[1] * known, params=SamplingParams(), seed=0, stop_ids=(),
        max_total=known + left, proposer="draft", num_draft_tokens=None,
    )  # fmt: skip
    made.num_draft_scheduled_tokens, made.estimate = known - 2 - behind, key
    assert draft_gap(made) == behind
    return made


def test_little_evidence_is_hope_and_much_is_none() -> None:
    costs = CostModel(gpu_like()).costs(8, 100, [])
    few, many = (Saving.of({estimate(0.7, rounds): 8}, (2,), costs) for rounds in (4, 400))
    assert 0 < few.likely < few.hoped and few.hoped - few.likely > 2 * (many.hoped - many.likely)
    assert many.and_also(Saving(-1.0, 5.0)) == Saving(-1.0, many.hoped)
    assert Saving(-1.0, -1.0).worth < 0 < Saving(-1.0, 1.0).worth < Saving(1.0, 1.0).worth


def test_what_is_paid_must_come_back_over_the_tokens_that_are_left() -> None:
    saving, price = Saving(0.02, 0.02), 0.01
    pays = int(200 * saving.likely / price / PAYS)
    rows = [request("a", behind=pays - 1), request("b", behind=pays + 1), request("c", behind=pays - 1, left=100)]
    gaps = {one: draft_gap(one) for one in rows}
    assert {one.request_id for one in unpaid(gaps, saving, {"draft": price})} == {"b", "c"}
    assert unpaid({request("d", behind=1): 1}, Saving(-0.1, -0.1), {"draft": price})


@pytest.mark.parametrize("rows", [TRIED_ROWS, TRIED_ROWS + 1])
def test_a_few_rows_try_first(rows: int) -> None:
    new, old = estimate(0.7, KNOWN - 1), estimate(0.7, 3 * KNOWN)
    late = [request(str(row), behind=50 - row, key=new) for row in range(rows)]
    late += [request(f"old {row}", behind=50, key=old) for row in range(9)]
    assert unknown(late, {new: 3, old: 3}) == ({new} if rows > TRIED_ROWS else set())
    assert not unknown(late, {new: 0, old: 3})
    caught_up = request("caught up", behind=0, key=new)
    tried = first_to_try([*late[:rows], caught_up])
    assert tried[0] is caught_up and len(tried) == TRIED_ROWS
