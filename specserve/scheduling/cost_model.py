"""CostModel: the table and what the steps that ran taught about it, laid out for one step's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from specserve.scheduling.corrections import Corrections
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS, MAX_POSITIONS, CostTable
from specserve.scheduling.draft_choice import FLOOR, Group, StepCosts

MAX_KEPT = 64
CATCH_UP_TOKENS = 1024  # at which a draft's prefill is priced by the token: that of several requests shares steps
MAX_CATCH_UP = 0.5  # of a step's time; beyond that its time tells of draft prefill, not of drafts
LEAST_CATCHING_UP, MOST_CATCHING_UP = 0.5, 4.0  # times the table's draft prefill that are believed …
CATCHING_UP_WEIGHT = 0.2  # … and how much of it a step says


@dataclass(slots=True)
class StepShape:
    """A step of decode rows and nothing else: `tokens` = rows + drafts; `dressed`: whether any of them has adapters;
    `drafting[proposer]`: its rows and passes; `catch_up[proposer]`: tokens of draft prefill."""

    rows: int
    tokens: int
    drafting: dict[str, tuple[int, int]] = field(default_factory=dict)
    catch_up: dict[str, int] = field(default_factory=dict)
    dressed: bool = False


class CostModel:
    """`version` changes whenever a cost does; `ratio` is observed over predicted step time, lately, `catching_up` the
    same of draft prefill alone. `dressed`: whether it is of steps with adapters."""

    def __init__(self, table: CostTable, *, dressed: bool = False) -> None:
        self.table, self.dressed = table, dressed
        self.ratio = self.catching_up = 1.0
        self._corrections = Corrections()
        self._targets: dict[int, list[float]] = {}
        self._first: dict[str, list[float]] = {name: [0.0] for name in table.drafting}
        self._further: dict[str, list[float]] = {name: [0.0] for name in table.drafting}

    @property
    def version(self) -> int:
        return self._corrections.version

    def costs(self, rows: int, spare: int, forced: Sequence[tuple[Group, int]]) -> StepCosts:
        """What steps of `rows` decode rows cost, which may draft up to `spare` tokens; `forced`: groups that draft so
        many whatever it costs."""
        self._extend(rows)
        max_drafts = max(0, min(MAX_AUTO_DRAFTS, MAX_POSITIONS // rows - 1, spare)) if self.table.verify else 0
        asked = sum(group.rows * drafts for group, drafts in forced)
        target = self._target(rows)
        using: dict[str, tuple[int, int]] = {}
        worth = 0.0
        for group, drafts in forced:
            count, passes = using.get(group.proposer, (0, 0))
            using[group.proposer] = (count + group.rows, max(passes, drafts))
            worth += group.rows * sum(group.profile[:drafts])
        return StepCosts(
            rows=rows,
            dressed=self.dressed,
            max_drafts=max_drafts,
            target=target[: max(1, min(len(target), max(spare, asked) + 1))],
            line=self._corrections.line(rows),
            first=self._first,
            further=self._further,
            forced_tokens=asked,
            forced_worth=worth,
            forced=using,
        )

    def _target(self, rows: int) -> list[float]:
        """The table's costs of these rows with 0, 1, … drafts among them."""
        found = self._targets.get(rows)
        if found is None:
            if len(self._targets) >= MAX_KEPT:
                self._targets.clear()
            most = max(0, min(MAX_POSITIONS - rows, rows * MAX_AUTO_DRAFTS)) if self.table.verify else 0
            found = self._targets[rows] = [self.table.target(rows, rows + drafts) for drafts in range(most + 1)]
        return found

    def _extend(self, rows: int) -> None:
        for name, costs in self.table.drafting.items():
            first, further = self._first[name], self._further[name]
            for count in range(len(first), rows + 1):
                first.append(costs.first(count))
                further.append(costs.further(count))

    def catch_up(self, proposer: str, tokens: int) -> float:
        """Milliseconds of the draft model's prefill over `tokens`."""
        return self.catching_up * self.table.catch_up(proposer, tokens)

    def catch_up_per_token(self, proposer: str) -> float:
        return self.catch_up(proposer, CATCH_UP_TOKENS) / CATCH_UP_TOKENS

    def wants_plain(self, rows: int) -> bool:
        """Whether a step of about so many rows should do without drafts, to tell what that takes."""
        return self._corrections.wants_plain(rows)

    def observe(self, shape: StepShape, milliseconds: float) -> None:
        """A step of this shape took so long."""
        if shape.tokens > shape.rows and not self.table.verify:
            return
        catch_up = sum(self.catch_up(name, tokens) for name, tokens in shape.catch_up.items())
        drafting = sum(self.table.draft(name, *used) for name, used in shape.drafting.items())
        decode, table = self.table.decode(shape.rows), self.table.target(shape.rows, shape.tokens) + drafting
        line = self._corrections.line(shape.rows)
        if catch_up > MAX_CATCH_UP * (table + catch_up):
            seen = self.catching_up * (milliseconds - table - line.at(table - decode)) / catch_up
            believed = max(LEAST_CATCHING_UP, min(MOST_CATCHING_UP, seen))
            self.catching_up += CATCHING_UP_WEIGHT * (believed - self.catching_up)
            return
        table += catch_up
        predicted = max(table + line.at(table - decode), FLOOR * table)
        self.ratio += 0.02 * (min(milliseconds / predicted, 10.0) - self.ratio)
        self._corrections.observe(shape.rows, decode, table, milliseconds)
