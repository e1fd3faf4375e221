"""How many tokens each row of a step drafts, so that the step gives most tokens a millisecond.

All rows share the step, so the choice is one: maximise Σ expected tokens / cost(step). Draft j of a row is worth the
probability that it and those before it are accepted; whatever its row, it adds one token to verify, and the proposer's
passes are as many as the longest row's drafts. Hence, for each limit on passes, drafts are taken in the order of their
worth, and the best of all steps met on the way is chosen. Not the first that is better than its successor: costs have
jumps, and the first draft pays for leaving the decode graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from specserve.scheduling.acceptance import Profile
from specserve.scheduling.corrections import NOTHING, Line

MAX_GROUPS = 8  # more are taken together with their neighbours: the choice must stay cheap
FLOOR = 0.2  # of the table's cost is the least that any correction leaves

_Item = tuple[int, int, str, int, float]  # group, position, proposer, rows, worth of a row's draft


class Group(NamedTuple):
    """`rows` rows whose drafts one proposer makes and that are accepted alike."""

    proposer: str
    profile: Profile
    rows: int


@dataclass(slots=True)
class StepCosts:
    """What steps of these decode rows cost, in milliseconds.

    `target[n]`: with n drafts to verify, 0 … as many as may be drafted; `line`: what is to be added;
    `first[proposer][D]`, `further[proposer][D]`: a pass over D rows. `forced` drafts are asked for by requests: their
    tokens, what they are worth, and by proposer their rows and passes. `dressed`: whether that is with adapters.
    """

    rows: int
    max_drafts: int
    target: Sequence[float]
    first: Mapping[str, Sequence[float]]
    further: Mapping[str, Sequence[float]]
    line: Line = NOTHING
    forced_tokens: int = 0
    forced_worth: float = 0.0
    forced: dict[str, tuple[int, int]] = field(default_factory=dict)
    dressed: bool = False

    def drafting(self, proposer: str, rows: int, passes: int) -> float:
        if not passes or proposer not in self.first:
            return 0.0
        return self.first[proposer][rows] + (passes - 1) * self.further[proposer][rows]


@dataclass(slots=True)
class _Step:
    """A step that grows draft by draft; its value in expected tokens and its cost are kept up to date."""

    costs: StepCosts
    tokens: int  # drafts to verify
    worth: float
    using: dict[str, tuple[int, int]]  # proposer → rows, passes

    @classmethod
    def without_choice(cls, costs: StepCosts) -> _Step:
        return cls(costs, costs.forced_tokens, costs.rows + costs.forced_worth, dict(costs.forced))

    def add(self, group: Group, position: int) -> None:
        """Draft number `position` of each row of a group."""
        self.tokens += group.rows
        self.worth += group.rows * group.profile[position - 1]
        rows, passes = self.using.get(group.proposer, (0, 0))
        self.using[group.proposer] = (rows + group.rows if position == 1 else rows, max(passes, position))

    def milliseconds(self) -> float:
        costs = self.costs
        drafting = sum(costs.drafting(proposer, *used) for proposer, used in self.using.items())
        table = costs.target[min(self.tokens, len(costs.target) - 1)] + drafting
        return max(table + costs.line.at(table - costs.target[0]), FLOOR * table)

    def rate(self) -> float:
        """Expected tokens a millisecond."""
        return self.worth / self.milliseconds()


class Lengths(NamedTuple):
    """The choice: drafts of each group's rows, and the step's expected tokens and milliseconds."""

    drafts: tuple[int, ...]
    worth: float
    milliseconds: float


def best_lengths(groups: Sequence[Group], costs: StepCosts) -> Lengths:
    """The drafts of each group that give the step most expected tokens a millisecond."""
    if len(groups) <= MAX_GROUPS:
        return evaluate(groups, _search(groups, costs), costs)
    parts = _alike(groups)
    means = [_mean([groups[index] for index in part]) for part in parts]
    drafts = [0] * len(groups)
    for part, count in zip(parts, _search(means, costs), strict=True):
        for index in part:
            drafts[index] = count
    return evaluate(groups, drafts, costs)


def evaluate(groups: Sequence[Group], drafts: Sequence[int], costs: StepCosts) -> Lengths:
    """What a given choice is worth and costs."""
    step = _Step.without_choice(costs)
    for group, count in zip(groups, drafts, strict=True):
        for position in range(1, count + 1):
            step.add(group, position)
    return Lengths(tuple(drafts), step.worth, step.milliseconds())


def _search(groups: Sequence[Group], costs: StepCosts) -> list[int]:
    """The best of all steps that are met on the way; `evaluate` says the same of each of them, more slowly."""
    order = sorted(
        (-value, index, position)
        for index, group in enumerate(groups)
        for position, value in enumerate(group.profile[: costs.max_drafts], start=1)
    )
    items = [(index, position, groups[index].proposer, groups[index].rows, -value) for value, index, position in order]
    best_rate, best_drafts = _Step.without_choice(costs).rate(), [0] * len(groups)
    for limits in _limits(sorted({group.proposer for group in groups}), costs.max_drafts):
        found = _walk(items, [0] * len(groups), limits, costs, best_rate)
        if found is not None:
            best_rate, best_drafts = found
    return best_drafts


def _walk(
    items: Sequence[_Item], drafts: list[int], limits: Mapping[str, int], costs: StepCosts, best_rate: float
) -> tuple[float, list[int]] | None:
    """Add drafts one after the other, as the limits on passes let; the best step on the way that has as many passes
    as a limit (those with fewer have their own walk), if it is better than `best_rate`."""
    target, room, plain = costs.target, len(costs.target), costs.target[0]
    offset, slope = costs.line.offset, costs.line.slope
    tokens, worth = costs.forced_tokens, costs.rows + costs.forced_worth
    used = dict(costs.forced)
    parts = {name: costs.drafting(name, *using) for name, using in used.items()}
    best: tuple[float, list[int]] | None = None
    reached = False
    for index, position, proposer, rows, value in items:
        if position > limits[proposer] or tokens + rows >= room:
            continue
        tokens += rows
        worth += rows * value
        drafts[index] = position
        count, passes = used.get(proposer, (0, 0))
        if position == 1 or position > passes:
            passes = max(passes, position)
            used[proposer] = (count + rows if position == 1 else count, passes)
            parts[proposer] = costs.drafting(proposer, *used[proposer])
            reached = reached or position == limits[proposer]
        if reached:
            table = target[tokens] + (sum(parts.values()) if len(parts) > 1 else parts[proposer])
            rate = worth / max(table + offset + slope * (table - plain), FLOOR * table)
            if rate > best_rate:
                best_rate, best = rate, (rate, drafts.copy())
    return best


def _limits(proposers: Sequence[str], max_drafts: int) -> Iterable[Mapping[str, int]]:
    """Limits on the passes of each proposer. One has all; several, which seldom meet in a step, only some."""
    if len(proposers) == 1:
        return [{proposers[0]: limit} for limit in range(1, max_drafts + 1)]
    some = sorted({limit for limit in (0, 1, 2, 4) if limit < max_drafts} | {max_drafts})
    return (dict(zip(proposers, limits, strict=True)) for limits in product(some, repeat=len(proposers)) if any(limits))


def _alike(groups: Sequence[Group]) -> list[list[int]]:
    """Places of groups that shall share a number: neighbours in acceptance, of one proposer."""
    order = sorted(range(len(groups)), key=lambda index: (groups[index].proposer, groups[index].profile))
    size = -(-len(order) // MAX_GROUPS)
    parts: list[list[int]] = []
    for index in order:
        last = parts[-1] if parts else []
        if not last or len(last) == size or groups[last[0]].proposer != groups[index].proposer:
            parts.append([])
        parts[-1].append(index)
    return parts


def _mean(groups: Sequence[Group]) -> Group:
    """One group for several, its profile averaged over their rows."""
    rows = sum(group.rows for group in groups)
    columns = zip(*(group.profile for group in groups), strict=True)
    weights = [group.rows for group in groups]
    profile = tuple(sum(v * w for v, w in zip(column, weights, strict=True)) / rows for column in columns)
    return Group(groups[0].proposer, profile, rows)
