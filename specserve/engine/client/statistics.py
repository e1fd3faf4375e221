"""What the client knows of an engine: the latest counters, and every adapter although only changes are told."""

from __future__ import annotations

from msgspec.structs import replace

from specserve.core.messages import EngineStats


def merge_stats(known: EngineStats, told: EngineStats) -> EngineStats:
    """`told` with all adapters in it: those known so far, less the removed ones, with the changed ones in their places.

    An engine that just started tells of all its adapters, so `known` is then `EngineStats()`.
    """
    if not (told.adapters or told.removed_adapters):
        return replace(told, adapters=known.adapters)
    infos = {info.name: info for info in known.adapters}
    for name in told.removed_adapters:
        infos.pop(name, None)
    infos.update({info.name: info for info in told.adapters})
    return replace(told, adapters=list(infos.values()), removed_adapters=[])
