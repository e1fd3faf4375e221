"""DraftPolicy: what the scheduler asks, once a step, about how many tokens each decode row drafts.

It brings together what a step costs (cost_table.py, corrected by the steps that ran), how likely drafts are accepted
(acceptance.py), the choice between the two (draft_choice.py), whose draft prefill pays (draft_prefill.py), and a little
probing. The choice depends on what earlier steps gave, never on what this one drafts, so verification stays exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from specserve.scheduling.acceptance import Acceptance, AcceptanceKey, Estimate, profile_of
from specserve.scheduling.cost_model import CostModel, StepShape
from specserve.scheduling.cost_table import CostTable
from specserve.scheduling.draft_choice import Group, Lengths, StepCosts, best_lengths, evaluate
from specserve.scheduling.draft_prefill import MARGIN, TRIED_DRAFTS, Saving, first_to_try, unknown, unpaid
from specserve.scheduling.drafts import draft_gap
from specserve.scheduling.probing import PROBE_DRAFTS, Probing
from specserve.scheduling.request import Request

HOPEFUL = profile_of(0.95)  # where not even this is worth drafting, nothing is to be learnt by a probe
BEGIN, GO_ON = 1.045, MARGIN  # times the tokens a millisecond of a step without drafts, for drafts to be made at all
MAX_KEPT = 256


@dataclass(slots=True)
class Choice:
    """One step's: drafts by key, and of which rows this is not true: those that draft to find out, and how much; and
    those that are idle, as they would have to catch up more of the draft's KV than their drafts are worth."""

    lengths: dict[Estimate, int] = field(default_factory=dict)
    probed: Mapping[Request, int] = field(default_factory=dict)
    idle: Collection[Request] = ()

    def drafts(self, request: Request) -> int:
        """For a request that asked for no number."""
        if request in self.probed:
            return self.probed[request]
        if request.estimate is None or request in self.idle:
            return 0
        return self.lengths.get(request.estimate, 0)


NO_CHOICE = Choice()


class DraftPolicy:
    """Without a `table` nothing is drafted unasked. `draft_kv[name]`: whether that proposer keeps KV of its own."""

    def __init__(self, draft_kv: Mapping[str, bool], table: CostTable | None = None) -> None:
        self.acceptance = Acceptance()
        self.probing = Probing(draft_kv)
        self.models: dict[bool, CostModel] = {}  # of steps without adapters and with; {}: nothing is known
        self.ratio = 1.0  # observed over predicted time of the kind of step that was last observed, lately
        self.mean_drafts = 0.0  # of the rows that asked for no number, in the last step that had any
        self._draft_kv = draft_kv
        self._shapes: deque[StepShape | None] = deque()  # of steps in flight
        self._kept: dict[tuple[object, ...], Lengths] = {}
        self._kept_version = -1
        self._drafting = False  # whether the last choice had drafts
        if table is not None:
            self.install(table)

    def install(self, table: CostTable, dressed: CostTable | None = None) -> None:
        """From now on the engine chooses by this table; where rows have adapters by `dressed`, if that is known."""
        self.models = {False: CostModel(table), True: CostModel(dressed or table, dressed=True)}
        self._kept.clear()

    def enter(self, request: Request, adapters: Sequence[tuple[str, float]]) -> None:
        """A request takes a row: find what is known of its like."""
        if request.proposer is not None:
            method = "greedy" if request.params.greedy else request.params.method
            request.estimate = self.acceptance.get(AcceptanceKey(tuple(adapters), method, request.proposer))

    def note(self, request: Request, planned: int, accepted: int) -> None:
        """One round of a row came back."""
        if request.estimate is not None:
            self.acceptance.note(request.estimate, planned, accepted)

    # --- the choice -------------------------------------------------------------------------------------------------

    def choose(self, decodes: Sequence[Request], spare: int, coming: int = 0) -> Choice:
        """Drafts for a step of these rows, which together may take `spare` tokens beside their own. `coming`: rows that
        will soon be beside them."""
        free = [request for request in decodes if request.num_draft_tokens is None and request.estimate is not None]
        if not self.models or not free:
            return NO_CHOICE
        everybody = counts = _counted(free)
        forced = _forced(decodes) if len(free) < len(decodes) else []
        model = self.models[any(request.lora for request in decodes)]
        costs = model.costs(len(decodes), spare, forced)
        found = self._best(counts, costs)
        idle, tried = set[Request](), set[Request]()
        if any(found.drafts):
            soon = model.costs(len(decodes) + coming, spare, []) if coming else None
            idle, tried = self._not_yet(free, counts, found, costs, soon)
            if idle:
                counts = _counted([request for request in free if request not in idle])
                found = self._best(counts, costs)
            found = self._if_worthwhile(counts, found, costs)
        self._drafting = any(found.drafts)
        probed = dict.fromkeys(tried, TRIED_DRAFTS)
        if self._is_control(counts, found, costs):
            found, probed = found._replace(drafts=(0,) * len(counts)), {}
        elif not tried and (idle or not all(found.drafts)) and self._hopeful(everybody, costs):
            lengths = dict(zip(counts, found.drafts, strict=True))
            others = [request for request in free if not lengths.get(cast(Estimate, request.estimate))]
            picked = self.probing.pick(others, partial(self._price, counts, found, costs))
            probed = dict.fromkeys(picked, PROBE_DRAFTS)
        drafted = sum(rows * drafts for rows, drafts in zip(counts.values(), found.drafts, strict=True))
        self.mean_drafts = drafted / len(free)
        return Choice(dict(zip(counts, found.drafts, strict=True)), probed, idle)

    def _best(self, counts: Mapping[Estimate, int], costs: StepCosts) -> Lengths:
        """The choice; steps repeat, and so does it."""
        return self._best_of(_groups(counts), costs)

    def _best_of(self, groups: Sequence[Group], costs: StepCosts) -> Lengths:
        version = sum(model.version for model in self.models.values())
        if version != self._kept_version or len(self._kept) >= MAX_KEPT:
            self._kept.clear()
            self._kept_version = version
        key = (*groups, costs.dressed, costs.rows, len(costs.target), costs.forced_worth, *costs.forced.items())
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = best_lengths(groups, costs)
        return found

    def _if_worthwhile(self, counts: Mapping[Estimate, int], found: Lengths, costs: StepCosts) -> Lengths:
        """The choice if drafting gains a margin, else none.

        The margin stands for what the rate does not know: costs are right to a few percent only, and of many steps that
        are about as good the one that looks best is flattered, as is acceptance; and among answers that begin together
        the one whose drafts are accepted least ends last (of 8 with one draft a step, after about 5 % more steps than
        the mean of 128 tokens takes).
        """
        none = evaluate(_groups(counts), (0,) * len(counts), costs)
        gain = found.worth / found.milliseconds * none.milliseconds / none.worth
        return found if gain >= (GO_ON if self._drafting else BEGIN) else none

    def _not_yet(
        self,
        free: Sequence[Request],
        counts: Mapping[Estimate, int],
        found: Lengths,
        costs: StepCosts,
        soon: StepCosts | None,
    ) -> tuple[set[Request], set[Request]]:
        """Rows that do not draft for they would have to be caught up first, and those few of them that do so to find
        out what it is worth. `soon`: steps of the batch that will be, in which it must pay as well."""
        gaps = {request: draft_gap(request) for request in free if self._draft_kv[cast(str, request.proposer)]}
        gaps = {request: gap for request, gap in gaps.items() if gap}
        if not gaps:
            return set(), set()
        saving = Saving.of(counts, found.drafts, costs)
        if soon is not None:
            grown = {estimate: max(1, rows * soon.rows // costs.rows) for estimate, rows in counts.items()}
            saving = saving.and_also(Saving.of(grown, self._best(grown, soon).drafts, soon))
        model = self.models[costs.dressed]
        idle = unpaid(gaps, saving, {name: model.catch_up_per_token(name) for name, kv in self._draft_kv.items() if kv})
        tried: set[Request] = set()
        paying = [request for request in gaps if request not in idle]
        for estimate in unknown(paying, dict(zip(counts, found.drafts, strict=True))):
            alike = [request for request in free if request.estimate is estimate]
            tried.update(first_to_try(request for request in alike if request not in idle))
            idle.update(alike)
        return idle, tried

    # --- learning on purpose ----------------------------------------------------------------------------------------

    def _hopeful(self, counts: Mapping[Estimate, int], costs: StepCosts) -> bool:
        """Whether there could be an acceptance at which these rows draft."""
        rows: dict[str, int] = {}
        for estimate, count in counts.items():
            rows[estimate.key.proposer] = rows.get(estimate.key.proposer, 0) + count
        return any(self._best_of([Group(name, HOPEFUL, count) for name, count in rows.items()], costs).drafts)

    def _price(
        self,
        counts: Mapping[Estimate, int],
        found: Lengths,
        costs: StepCosts,
        rows: Mapping[str, int],
        gaps: Mapping[str, int],
    ) -> float:
        """Milliseconds that probing so many rows of each proposer takes, with `gaps` tokens of draft prefill."""
        if sum(rows.values()) * PROBE_DRAFTS + costs.forced_tokens >= len(costs.target):
            return math.inf
        probes = [Group(name, HOPEFUL, count) for name, count in rows.items()]
        drafts = (*found.drafts, *[min(PROBE_DRAFTS, costs.max_drafts)] * len(probes))
        longer = evaluate([*_groups(counts), *probes], drafts, costs).milliseconds - found.milliseconds
        return longer + sum(self.models[costs.dressed].catch_up(name, tokens) for name, tokens in gaps.items())

    def _is_control(self, counts: Mapping[Estimate, int], found: Lengths, costs: StepCosts) -> bool:
        """Whether this step does without drafts, so that it is known what that costs."""
        if not any(found.drafts) or costs.forced or not self.models[costs.dressed].wants_plain(costs.rows):
            return False
        none = evaluate(_groups(counts), (0,) * len(counts), costs)
        return self.probing.buy(none.milliseconds - none.worth * found.milliseconds / found.worth)

    # --- what steps take --------------------------------------------------------------------------------------------

    def planned(self, shape: StepShape | None) -> None:
        """A step was planned; None: it is not one that the table describes."""
        self._shapes.append(shape)

    def took(self, milliseconds: float | None) -> None:
        """The oldest planned step is over and took so long (None: not known)."""
        shape = self._shapes.popleft()
        if milliseconds is None:
            return
        self.probing.earn(milliseconds)
        if shape is not None and self.models:
            model = self.models[shape.dressed]
            model.observe(shape, milliseconds)
            self.ratio = model.ratio


def _counted(requests: Iterable[Request]) -> dict[Estimate, int]:
    """Rows by key."""
    counts: dict[Estimate, int] = {}
    for request in requests:
        if request.estimate is not None:
            counts[request.estimate] = counts.get(request.estimate, 0) + 1
    return counts


def _groups(counts: Mapping[Estimate, int]) -> list[Group]:
    return [Group(estimate.key.proposer, estimate.refresh(), rows) for estimate, rows in counts.items()]


def _forced(decodes: Iterable[Request]) -> list[tuple[Group, int]]:
    """Rows that asked for a number, and the number."""
    counts: dict[tuple[Estimate, int], int] = {}
    for request in decodes:
        if request.estimate is not None and request.num_draft_tokens:
            key = (request.estimate, request.num_draft_tokens)
            counts[key] = counts.get(key, 0) + 1
    return [(Group(key.key.proposer, key.refresh(), rows), drafts) for (key, drafts), rows in counts.items()]
