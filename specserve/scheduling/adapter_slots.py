"""What scheduling needs of the AdapterManager."""

from __future__ import annotations

from typing import Protocol

from specserve.core.messages import LoraRef
from specserve.core.plan import AdapterLoad
from specserve_adapters.entry import AdapterUse

Uses = tuple[AdapterUse, ...]
SlotWeights = tuple[tuple[int, float], ...]  # (device slot, weight)


class AdapterSlots(Protocol):
    """An adapter's way: `acquire`, `prepare` (into host memory), `take_slots`, `slots_live`, and back."""

    def acquire(self, refs: tuple[LoraRef, ...]) -> Uses: ...

    def prepare(self, uses: Uses) -> bool:
        """Whether all are in host memory, which stays so; what is not begins to be read. Raises AdapterError."""
        ...

    def take_slots(self, uses: Uses) -> tuple[SlotWeights, list[AdapterLoad]] | None:
        """Slots for prepared uses and what must be copied into them; None, and nothing is taken, if they lack."""
        ...

    def slots_live(self, uses: Uses) -> bool:
        """Whether each of these prepared uses lies in a slot, taken or not, and is there wholly."""
        ...

    def release_slots(self, uses: Uses) -> None: ...
    def release(self, uses: Uses) -> None: ...
    def cache_key(self, uses: Uses) -> list[tuple[str, float]]: ...
    def weight_of(self, uses: Uses) -> float: ...
    def count_tokens(self, uses: Uses, tokens: int, drafted: int, accepted: int) -> None: ...
