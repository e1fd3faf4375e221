"""How many drafts were accepted: in all, by position, by adapter, as `usage.speculation` of each request tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import msgspec

from specserve.bench.records import RequestRecord


class Acceptance(msgspec.Struct, frozen=True):
    """`drafted[j]`: rounds with a draft at position j; `accepted[j]`: those that kept it, and so all before it."""

    drafted: list[int]
    accepted: list[int]

    @property
    def rate(self) -> float:
        """Accepted drafts of all drafted."""
        return sum(self.accepted) / sum(self.drafted)

    @property
    def length(self) -> float:
        """Tokens that a round with drafts brings: those accepted and the target's own."""
        return 1 + sum(self.accepted) / self.drafted[0]

    @property
    def per_position(self) -> list[float]:
        return [kept / tried for tried, kept in zip(self.drafted, self.accepted, strict=True)]

    def flat(self) -> dict[str, float]:
        """By vLLM's names; rates are shares there too, but `acceptance_rate`, which is in percent."""
        return {
            "spec_decode_num_drafts": self.drafted[0],
            "spec_decode_draft_tokens": sum(self.drafted),
            "spec_decode_accepted_tokens": sum(self.accepted),
            "spec_decode_acceptance_rate": 100 * self.rate,
            "spec_decode_acceptance_length": self.length,
        }


def acceptance(records: Iterable[RequestRecord]) -> Acceptance | None:
    """Of all of them together; None: nothing was drafted."""
    both = [(record.drafted_per_position, record.accepted_per_position) for record in records]
    drafted, accepted = by_position(one for one, _ in both), by_position(one for _, one in both)
    positions = len(drafted)
    while positions and not drafted[positions - 1]:
        positions -= 1
    if not positions:
        return None
    return Acceptance(drafted[:positions], by_position([accepted, [0] * positions])[:positions])


def by_adapter(records: Iterable[RequestRecord]) -> Mapping[str | None, Acceptance]:
    """Of each adapter for which something was drafted, by name; None: the base model."""
    groups: dict[str | None, list[RequestRecord]] = {}
    for record in records:
        groups.setdefault(record.adapter, []).append(record)
    found = {name: acceptance(groups[name]) for name in sorted(groups, key=lambda name: name or "")}
    return {name: one for name, one in found.items() if one is not None}


def by_position(counts: Iterable[Sequence[int]]) -> list[int]:
    """Sums of lists that may differ in length."""
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]
