"""The CostTable of this engine on this device, measured by trial steps."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from specserve.runtime.trials import Trial, Trials, one_draft, trial_rows, uniform
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS, MAX_POSITIONS, CostTable, DraftCosts
from specserve.scheduling.curve import Curve

SECONDS = {"cpu": 0.8, "cuda": 1.8}  # for all trials
FREE = "ngram"  # the proposer whose drafts count as free: always there, and one small launch
DRAFTER = "draft_model"
FEW, SOME = 1, 4  # drafts, from which the first pass and the further ones are told apart
CATCH_UP = (16, 128, 512)  # tokens

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
    """Try steps of up to `max_rows` rows and `max_tokens` tokens; None if time did not even suffice for one."""
    found = _Found()
    for rows in trial_rows(max_rows):
        _measure_rows(found, trials.milliseconds, rows, min(MAX_POSITIONS, max_tokens), DRAFTER in proposers)
        if rows == 1 and DRAFTER in proposers:
            _measure_catch_up(found, trials.milliseconds, max_tokens)
    if not found.decode:
        return None
    drafting = {}
    if found.first:
        costs = DraftCosts(
            Curve(found.first.items()), Curve(found.further.items()), Curve(found.catch_up.items() or [(1, 0.0)])
        )
        drafting = {name: costs for name in proposers if DRAFTER in name.split("+")}
    return CostTable(
        decode=Curve(found.decode.items()),
        verify=[(rows, Curve(points.items())) for rows, points in sorted(found.verify.items())],
        drafting=drafting,
    )


def _measure_rows(found: _Found, milliseconds: Milliseconds, rows: int, max_tokens: int, drafter: bool) -> None:
    """Steps of so many rows, from those that matter most."""
    plain = milliseconds(uniform(rows, 0, None))
    if plain is None:
        return
    found.decode[rows] = plain
    for drafts in (FEW, SOME, MAX_AUTO_DRAFTS):
        if rows * (1 + drafts) > max_tokens:
            break
        free = milliseconds(uniform(rows, drafts, FREE))
        if free is None:
            break
        found.verify.setdefault(rows, {})[rows * (1 + drafts)] = free
        whole = milliseconds(uniform(rows, drafts, DRAFTER)) if drafter and drafts != MAX_AUTO_DRAFTS else None
        if whole is not None and drafts == FEW:
            found.first[rows] = found.further[rows] = max(0.0, whole - free)
        elif whole is not None:
            found.further[rows] = max(0.0, whole - free - found.first[rows]) / (SOME - FEW)
    if rows > 1 and rows in found.verify and (free := milliseconds(one_draft(rows, FREE))) is not None:
        found.verify[rows][rows + 1] = free


def _measure_catch_up(found: _Found, milliseconds: Milliseconds, max_tokens: int) -> None:
    """The draft's prefill: what it adds to a decode step."""
    for tokens in CATCH_UP:
        whole = milliseconds(Trial((0,), DRAFTER, catch_up=tokens)) if tokens < max_tokens else None
        if whole is None:
            return
        found.catch_up[tokens] = max(0.0, whole - found.decode[1])
