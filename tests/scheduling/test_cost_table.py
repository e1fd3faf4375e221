"""What steps are said to cost: curves, the table, what step times teach about it, and the choice that follows."""

from __future__ import annotations

import random
from itertools import product

import pytest

from schedkit.simulation import gpu_like
from specserve.scheduling.acceptance import (
    FIRST_GUESS,
    Acceptance,
    AcceptanceKey,
    Estimate,
    profile_of,
)
from specserve.scheduling.corrections import NOTHING, Corrections, Line
from specserve.scheduling.cost_model import CostModel, StepShape
from specserve.scheduling.cost_table import CostTable, DraftCosts
from specserve.scheduling.curve import Curve
from specserve.scheduling.draft_choice import MAX_GROUPS, Group, StepCosts, best_lengths, evaluate

KEY = AcceptanceKey((), "greedy", "draft")


def test_curve_is_straight_between_points_and_never_falls() -> None:
    curve = Curve([(8, 4.0), (1, 2.0), (16, 3.0), (32, 8.0)])
    assert curve(0) == curve(1) == 2.0
    assert curve(4.5) == 3.0
    assert curve(12) == curve(16) == 4.0  # the point below its predecessor is lifted
    assert curve(40) == 10.0
    values = [curve(x / 4) for x in range(200)]
    assert values == sorted(values)


def test_target_compares_the_same_tokens_a_row() -> None:
    table = CostTable(
        decode=Curve([(1, 1.0), (9, 2.0)]),
        verify=[(1, Curve([(2, 2.0), (4, 4.0)])), (9, Curve([(18, 10.0), (36, 20.0)]))],
    )
    assert table.target(5, 5) == 1.5
    assert table.target(1, 3) == 3.0
    assert table.target(9, 27) == 15.0
    assert table.target(5, 15) == 0.5 * 3.0 + 0.5 * 15.0
    assert table.target(18, 36) == 20.0  # twice the rows that were measured


def test_a_verification_is_never_said_to_be_cheaper_than_a_decode() -> None:
    table = CostTable(decode=Curve([(1, 5.0)]), verify=[(1, Curve([(2, 3.0), (9, 9.0)]))])
    assert table.target(1, 2) == 5.0


def test_passes_and_catch_up() -> None:
    costs = DraftCosts(Curve([(1, 2.0), (3, 4.0)]), Curve([(1, 1.0)]), Curve([(10, 3.0), (20, 5.0)]))
    table = CostTable(decode=Curve([(1, 5.0)]), drafting={"draft": costs})
    assert table.draft("draft", 2, 4) == 3.0 + 3 * 1.0
    assert table.draft("draft", 0, 4) == table.draft("draft", 2, 0) == table.draft("unknown", 2, 4) == 0.0
    assert table.catch_up("draft", 15) == 4.0
    assert table.catch_up("draft", 0) == table.catch_up("unknown", 15) == 0.0


def observed(corrections: Corrections, beyond: float, observed: float, times: int) -> None:
    for _ in range(times):
        corrections.observe(8, 10.0, 10.0 + beyond, observed)


def test_a_constant_difference_is_an_offset_and_stalls_are_none() -> None:
    corrections = Corrections()
    assert corrections.line(8) == NOTHING
    observed(corrections, 4.0, 17.0, 20)
    corrections.observe(8, 10.0, 14.0, 900.0)
    observed(corrections, 4.0, 17.0, 3)
    line = corrections.line(15)
    assert line.offset == pytest.approx(3.0, abs=0.2) and line.slope == 0.0
    assert corrections.line(16) == NOTHING


def test_steps_with_and_without_drafts_tell_the_slope() -> None:
    corrections = Corrections()
    for _ in range(20):
        observed(corrections, 4.0, 10.0 + 2.0 + 3.0 * 4.0, 5)
        observed(corrections, 0.0, 10.0 + 2.0, 1)
    line = corrections.line(8)
    assert line.at(0.0) == pytest.approx(2.0, abs=0.4)  # told anew only where a step's time changes by 3 %
    assert line.at(8.0) == pytest.approx(2.0 + 2.0 * 8.0, abs=1.2)


def test_corrections_do_not_flap_and_follow_a_change() -> None:
    draw = random.Random(1)
    corrections = Corrections()
    observed(corrections, 4.0, 20.0, 100)
    version = corrections.version
    for _ in range(300):
        observed(corrections, 4.0, 20.0 * draw.uniform(0.95, 1.05), 1)
    assert corrections.version - version <= 2
    observed(corrections, 4.0, 30.0, 500)
    assert corrections.version > version and corrections.line(8).at(4.0) == pytest.approx(16.0, abs=1.0)


def test_early_steps_without_drafts_tell_offset_from_slope() -> None:
    """Drafting costs three times what the table says: while all steps draft, that might be anything."""
    corrections = Corrections()
    assert not corrections.wants_plain(8)
    steps = []
    for _ in range(40):
        plain = corrections.wants_plain(8)
        steps.append(plain)
        observed(corrections, 0.0 if plain else 4.0, 10.0 if plain else 22.0, 1)
    assert steps.count(True) == 3 and steps.index(True) <= 8
    line = corrections.line(8)
    assert line.at(0.0) == pytest.approx(0.0, abs=0.5) and line.at(4.0) == pytest.approx(8.0, abs=0.7)
    observed(corrections, 4.0, 22.0, 100)
    assert not corrections.wants_plain(8)
    observed(corrections, 4.0, 22.0, 50)
    assert corrections.wants_plain(8) and not corrections.wants_plain(400)


def test_a_step_that_mostly_catches_up_teaches_nothing_about_drafts() -> None:
    model = CostModel(gpu_like())
    for _ in range(10):
        model.observe(StepShape(1, 3, {"draft": (1, 2)}, {"draft": 8000}), 100.0)
    assert model.version == 0
    for _ in range(10):
        model.observe(StepShape(1, 3, {"draft": (1, 2)}, {"draft": 8}), 100.0)
    assert model.version == 1 and model.ratio > 1.4


def test_estimates_begin_with_the_average_and_end_with_what_is_seen() -> None:
    draw = random.Random(3)
    acceptance = Acceptance()
    first = acceptance.get(KEY)
    assert first.conditional()[0] == pytest.approx(FIRST_GUESS)
    for _ in range(800):
        accepted = 0
        while accepted < 4 and draw.random() < (0.9, 0.8, 0.5, 0.2)[accepted]:
            accepted += 1
        acceptance.note(first, 4, accepted)
    assert first.conditional()[:4] == pytest.approx([0.9, 0.8, 0.5, 0.2], abs=0.09)
    assert list(first.refresh()) == sorted(first.profile, reverse=True)
    other = acceptance.get(KEY._replace(method="coupled"))
    assert other is not first and acceptance.get(KEY) is first
    assert other.conditional()[0] == pytest.approx(acceptance.average("draft")) != pytest.approx(FIRST_GUESS)


def test_drafts_that_a_proposer_did_not_find_count_against_it() -> None:
    estimate = Estimate(KEY, 0.6)
    for _ in range(100):
        estimate.note(4, 0)
    assert estimate.conditional()[0] < 0.05


def random_step(draw: random.Random) -> tuple[list[Group], StepCosts]:
    groups = [
        Group(draw.choice(["a", "b"]), profile_of(draw.uniform(0.1, 0.95)), draw.randint(1, 6))
        for _ in range(draw.randint(1, 3))
    ]
    rows = sum(group.rows for group in groups) + draw.randint(0, 3)
    base, slope, jump = draw.uniform(1, 9), draw.uniform(0.01, 0.3), draw.uniform(0, 2)
    costs = StepCosts(
        rows=rows,
        max_drafts=4,
        target=[base + (jump + slope * drafts if drafts else 0.0) for drafts in range(rows * 4 + 1)],
        first={name: [draw.uniform(0.1, 2.0)] * (rows + 1) for name in "ab"},
        further={name: [draw.uniform(0.1, 1.0)] * (rows + 1) for name in "ab"},
        line=Line(draw.uniform(-0.5, 2.0), draw.uniform(-0.5, 2.0)),
    )
    return groups, costs


def test_the_choice_is_as_good_as_trying_all() -> None:
    """Exactly so with one proposer; with two, whose passes may differ, all but."""
    draw = random.Random(11)
    for _ in range(300):
        groups, costs = random_step(draw)
        found = best_lengths(groups, costs)
        every = [evaluate(groups, drafts, costs) for drafts in product(range(5), repeat=len(groups))]
        best = max(step.worth / step.milliseconds for step in every)
        rate = found.worth / found.milliseconds
        assert rate >= best * (1.0 - 1e-9 if len({group.proposer for group in groups}) == 1 else 0.9)


def test_many_groups_share_numbers_with_their_like() -> None:
    groups = [Group("draft", profile_of(0.1 + 0.03 * index), 1) for index in range(3 * MAX_GROUPS)]
    costs = CostModel(gpu_like()).costs(len(groups), 1000, [])
    drafts = best_lengths(groups, costs).drafts
    assert list(drafts) == sorted(drafts) and drafts[0] < drafts[-1]
    rate = [
        found.worth / found.milliseconds for found in (best_lengths(groups, costs), evaluate(groups, (2,) * 24, costs))
    ]
    assert rate[0] > rate[1]


def test_no_more_is_drafted_than_the_step_has_room_for() -> None:
    costs = CostModel(gpu_like()).costs(8, 20, [])
    found = best_lengths([Group("draft", profile_of(0.9), 8)], costs)
    assert found.drafts == (2,)
