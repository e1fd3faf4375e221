"""How likely drafts are accepted: by adapters, method, proposer and position, learnt from each round.

Position j's probability is conditional on the drafts before it having been accepted. It is estimated from counts that
fade (the mean of a Beta whose prior is the position before it, and for the first one the proposer's average), so that
what was seen lately counts most. Slow counts make the estimate steady; beside them run fast ones, and where these two
differ by more than chance the text has changed, and the slow ones are forgotten.

The first draft's probability is told with some of its standard deviation on top: a row that drafts learns, one that
does not stays with its error, so that little evidence must not end drafting.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS

FIRST_GUESS = 0.6  # of a proposer of which nothing is known
PRIOR_WEIGHT = 3.0  # rounds that the prior is worth
SLOW, FAST = 1.0 - 1.0 / 400.0, 1.0 - 1.0 / 16.0  # what a round leaves of the counts before it
CHANGED = 0.33  # four standard deviations of a fast estimate at its widest
ENOUGH = 6.0  # fast rounds, before they may say that something changed
HOPE = 1.5  # deviations by which the first draft's probability is told higher than it seems
STEP = 0.02  # probabilities are told in such steps …
TOLERANCE = 0.03  # … and told anew when they have moved by more than this: k must not flap on noise
MAX_KEYS = 4096

Profile = tuple[float, ...]
"""Chance that draft 1, 2, … MAX_AUTO_DRAFTS of a row is accepted: products of the conditional ones, never rising."""


class AcceptanceKey(NamedTuple):
    """Whose drafts are alike: the adapters (version, scale), "greedy" or the method, the proposer."""

    adapters: tuple[tuple[str, float], ...]
    method: str
    proposer: str


def profile_of(conditional: float) -> Profile:
    """The profile of drafts that are all as likely, given the ones before."""
    return tuple(conditional**position for position in range(1, MAX_AUTO_DRAFTS + 1))


class Estimate:
    """One key's. `profile` is what the choice is told, `likely` the same without hope. `last_probe`: when it was last
    probed, in the order of probes."""

    __slots__ = ("_dirty", "_fast", "_prior", "_slow", "_told", "_weight", "key", "last_probe", "likely", "profile")

    def __init__(self, key: AcceptanceKey, prior: float) -> None:
        self.key = key
        self.last_probe = 0
        self._prior = prior
        self._weight = 1.0  # of the next round's slow counts: it grows where older ones should fade
        self._slow = [[0.0, 0.0] for _ in range(MAX_AUTO_DRAFTS)]  # accepted, verified; in units of the weight
        self._fast = [[0.0, 0.0] for _ in range(MAX_AUTO_DRAFTS)]
        self._told: list[float] = []
        self._dirty = True
        self.profile: Profile = ()
        self.likely: Profile = ()
        self.refresh()

    def note(self, planned: int, accepted: int) -> None:
        """One round: of `planned` drafts so many were accepted. A draft that the proposer failed to make counts as
        one that was not: its place was planned and paid for."""
        self._dirty = True
        self._weight /= SLOW  # deeper positions fade with the rounds that do not reach them
        if self._weight > 1e9:
            self._rescale()
        weight = self._weight
        for position in range(min(accepted + 1, planned, MAX_AUTO_DRAFTS)):
            slow, fast = self._slow[position], self._fast[position]
            taken = 1.0 if position < accepted else 0.0
            slow[0] += weight * taken
            slow[1] += weight
            fast[0] = fast[0] * FAST + taken
            fast[1] = fast[1] * FAST + 1.0
            if fast[1] > ENOUGH and abs(fast[0] / fast[1] - slow[0] / slow[1]) > CHANGED:
                slow[:] = [weight * count for count in fast]

    def fade(self, share: float) -> None:
        """What was seen counts for less by `share`, beside what will be."""
        self._weight /= 1.0 - share

    def _rescale(self) -> None:
        for counts in self._slow:
            counts[:] = [count / self._weight for count in counts]
        self._weight = 1.0

    @property
    def rounds(self) -> float:
        """How many rounds it rests on, as far as they have not faded."""
        return self._slow[0][1] / self._weight

    def told(self) -> list[float]:
        """What the choice is told: the estimates, the first one hopeful."""
        first, *others = self.conditional()
        deviation = math.sqrt(first * (1.0 - first) / (self.rounds + PRIOR_WEIGHT))
        return [min(1.0, first + HOPE * deviation), *others]

    def conditional(self) -> list[float]:
        """Each position's probability, given the ones before."""
        estimates = []
        prior = self._prior
        for accepted, tried in self._slow:
            prior = (accepted / self._weight + PRIOR_WEIGHT * prior) / (tried / self._weight + PRIOR_WEIGHT)
            estimates.append(prior)
        return estimates

    def refresh(self) -> Profile:
        """The profile, told anew if the estimates have moved."""
        if not self._dirty:
            return self.profile
        self._dirty = False
        now = self.told()
        if not self._told or max(abs(a - b) for a, b in zip(now, self._told, strict=True)) > TOLERANCE:
            self._told = now
            self.profile, self.likely = _products(now), _products(self.conditional())
        return self.profile


def _products(conditional: list[float]) -> Profile:
    product, profile = 1.0, []
    for value in conditional:
        product *= min(1.0, round(value / STEP) * STEP)
        profile.append(product)
    return tuple(profile)


class Acceptance:
    """All keys' estimates; those that nobody asked for longest are forgotten."""

    def __init__(self) -> None:
        self._estimates: OrderedDict[AcceptanceKey, Estimate] = OrderedDict()
        self._averages: dict[str, list[float]] = {}  # proposer → accepted, verified

    def get(self, key: AcceptanceKey) -> Estimate:
        found = self._estimates.get(key)
        if found is None:
            found = self._estimates[key] = Estimate(key, self.average(key.proposer))
            if len(self._estimates) > MAX_KEYS:
                self._estimates.popitem(last=False)
        self._estimates.move_to_end(key)
        return found

    def average(self, proposer: str) -> float:
        """A proposer's overall conditional acceptance."""
        accepted, tried = self._averages.get(proposer, (0.0, 0.0))
        return (accepted + PRIOR_WEIGHT * FIRST_GUESS) / (tried + PRIOR_WEIGHT)

    def note(self, estimate: Estimate, planned: int, accepted: int) -> None:
        """One round of a row."""
        estimate.note(planned, accepted)
        average = self._averages.setdefault(estimate.key.proposer, [0.0, 0.0])
        average[0] = average[0] * SLOW + accepted
        average[1] = average[1] * SLOW + min(accepted + 1, planned)
