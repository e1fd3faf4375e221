"""The adapters of live requests: who references what, who sits on a device row, and whether they can all go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from specserve_adapters.entry import AdapterUse, Entry, merge_uses

Uses = tuple[AdapterUse, ...]


class LiveUses:
    """Uses of the requests between acquire and release (`acquired`), and of those among them on a row (`placed`).

    Requests of the base model, with no uses, are not counted.
    """

    def __init__(self) -> None:
        self.acquired: Counter[Uses] = Counter()
        self.placed: Counter[Uses] = Counter()

    def acquire(self, uses: Uses) -> None:
        for use in uses:
            use.entry.refs += 1
        if uses:
            self.acquired[uses] += 1

    def release(self, uses: Uses) -> None:
        for use in uses:
            use.entry.refs -= 1
        _decrement(self.acquired, uses)
        assert self.placed[uses] <= self.acquired[uses], "release_slots() comes before release()"

    def place(self, uses: Uses) -> None:
        for record in {use.entry.record for use in uses}:
            record.running += 1
        if uses:
            self.placed[uses] += 1

    def unplace(self, uses: Uses) -> None:
        for record in {use.entry.record for use in uses}:
            record.running -= 1
        _decrement(self.placed, uses)

    def fit(self, num_slots: int, pins: Collection[object]) -> bool:
        """Whether every request could have its slots if these were pinned."""
        needs = ({use.entry for use in uses} for uses in (*self.acquired, ()))
        return all(len(need.union(pins)) <= num_slots for need in needs)

    def stuck(self) -> bool:
        """Whether requests hold host memory and none can go on, because each waits for a read that has not ended.

        Then nothing would ever be freed: the next adapter must be taken in, beyond the budget if need be.
        """
        return bool(self.acquired) and not any(
            all(use.entry.loaded or use.entry.error is not None for use in uses) for uses in self.acquired
        )

    def references(self) -> Counter[Entry]:
        """How often each entry is referenced."""
        counts: Counter[Entry] = Counter()
        for uses, count in self.acquired.items():
            for use in uses:
                counts[use.entry] += count
        return counts

    def slot_uses(self) -> Counter[str]:
        """How often each version is in use on a row."""
        counts: Counter[str] = Counter()
        for uses, count in self.placed.items():
            assert 0 < count <= self.acquired[uses]
            for version, _ in merge_uses(uses):
                counts[version] += count
        return counts


def _decrement(counter: Counter[Uses], uses: Uses) -> None:
    if uses:
        assert counter[uses] > 0, "more releases than acquisitions"
        counter[uses] -= 1
        if not counter[uses]:
            del counter[uses]
