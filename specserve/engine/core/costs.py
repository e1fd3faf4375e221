"""The CostTable of this engine on this device, measured by trial steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from specserve.runtime.trials import Trial, Trials, one_draft, trial_rows, uniform
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS, MAX_POSITIONS, CostTable, DraftCosts
from specserve.scheduling.curve import Curve

SECONDS = {"cpu": 0.8, "cuda": 3.0}  # for all trials
FREE = "ngram"  # the proposer whose drafts count as free: always there, and one small launch
DRAFTER = "draft_model"
FEW, SOME = 1, 4  # drafts, from which the first pass and the further ones are told apart
EDGE = 128  # tokens that a device's products of few rows take, adapters inside; one more is another kind of step
CATCH_UP, LONG = (16, 256, 1024), 20.0  # tokens; milliseconds beyond which more of them are not tried

Milliseconds = Callable[[Trial], float | None]
Points = dict[int, float]


@dataclass(slots=True)
class _Found:
    """What was measured, by rows; `verify` by rows, then tokens; `catch_up` by tokens."""

    decode: Points = field(default_factory=dict)
    verify: dict[int, Points] = field(default_factory=dict)
    first: Points = field(default_factory=dict)
    further: Points = field(default_factory=dict)
    catch_up: Points = field(default_factory=dict)


def measure_costs(trials: Trials, *, max_rows: int, max_tokens: int, proposers: Collection[str]) -> CostTable | None:
    """Try steps of up to `max_rows` rows and `max_tokens` tokens, the most telling ones first; None if time did not
    even suffice for one."""
    found, drafter = _Found(), DRAFTER in proposers
    room = min(MAX_POSITIONS, max_tokens)
    sizes = trial_rows(max_rows)
    for rows in sizes[:2]:
        _measure_rows(found, trials.milliseconds, rows, room, drafter)
    if drafter and found.decode:
        _measure_catch_up(found, trials.milliseconds, max_tokens)
    for rows in sizes[2:]:
        _measure_rows(found, trials.milliseconds, rows, room, drafter)
    for rows in sizes:
        _measure_edges(found, trials.milliseconds, rows, room)
    if not found.decode:
        return None
    drafting = {}
    if found.first:
        # a first pass reads two tokens a row: where time did not suffice for prefill itself, that says enough
        catch_up = found.catch_up or {2 * rows: taken for rows, taken in found.first.items()}
        costs = DraftCosts(Curve(found.first.items()), Curve(found.further.items()), Curve(catch_up.items()))
        drafting = {name: costs for name in proposers if DRAFTER in name.split("+")}
    return CostTable(
        decode=Curve(found.decode.items()),
        verify=[(rows, _verify_curve(found, rows)) for rows in sorted(found.verify)],
        drafting=drafting,
    )


def _verify_curve(found: _Found, rows: int) -> Curve:
    """By tokens. One point has no slope: the decode step, which is cheaper for its kind, then lends a steep one."""
    points = found.verify[rows]
    return Curve(points.items() if len(points) > 1 else [(rows, found.decode[rows]), *points.items()])


def _measure_rows(found: _Found, milliseconds: Milliseconds, rows: int, room: int, drafter: bool) -> None:
    """Steps of so many rows: without drafts, and with few and some, by a proposer that is free and by the draft model;
    the difference is what the draft model takes."""
    plain = milliseconds(uniform(rows, 0, None))
    if plain is None:
        return
    found.decode[rows] = plain
    for drafts in (FEW, SOME):
        free = milliseconds(uniform(rows, drafts, FREE)) if rows * (1 + drafts) <= room else None
        if free is None:
            return
        found.verify.setdefault(rows, {})[rows * (1 + drafts)] = free
        whole = milliseconds(uniform(rows, drafts, DRAFTER)) if drafter else None
        if whole is not None and drafts == FEW:
            found.first[rows] = found.further[rows] = max(0.0, whole - free)
        elif whole is not None:
            found.further[rows] = max(0.0, whole - free - found.first[rows]) / (SOME - FEW)


def _measure_edges(found: _Found, milliseconds: Milliseconds, rows: int, room: int) -> None:
    """The ends of a curve that has a middle: a single draft, which has left the decode step, and as many as may be; and
    where it jumps, lest what lies before the jump be thought half as dear as what lies behind it."""
    if rows not in found.verify:
        return
    wanted = [(rows + 1, one_draft(rows, FREE))]
    wanted += [(rows * (1 + drafts), uniform(rows, drafts, FREE)) for drafts in (MAX_AUTO_DRAFTS, EDGE // rows - 1)]
    for tokens, trial in wanted:
        known = tokens in found.verify[rows] or not rows < tokens <= min(room, rows * (1 + MAX_AUTO_DRAFTS))
        if not known and (taken := milliseconds(trial)) is not None:
            found.verify[rows][tokens] = taken


def _measure_catch_up(found: _Found, milliseconds: Milliseconds, max_tokens: int) -> None:
    """The draft's prefill: what it adds to a decode step."""
    for tokens in CATCH_UP:
        whole = milliseconds(Trial((0,), DRAFTER, catch_up=tokens)) if tokens < max_tokens else None
        if whole is None:
            return
        found.catch_up[tokens] = max(0.0, whole - found.decode[1])
        if whole > LONG:
            return
