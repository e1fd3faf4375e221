"""The client's view of all adapters, from what an engine says has changed."""

from __future__ import annotations

import random

from specserve.core.messages import AdapterInfo, EngineStats
from specserve.engine.client.statistics import merge_stats


def info(name: str, requests: int = 0) -> AdapterInfo:
    return AdapterInfo(name=name, path="", version="", tier="disk", requests=requests)


def test_changed_new_and_removed() -> None:
    view = merge_stats(EngineStats(), EngineStats(steps=1, adapters=[info("a"), info("b"), info("c")]))
    view = merge_stats(view, EngineStats(steps=2))
    assert (view.steps, [one.name for one in view.adapters]) == (2, ["a", "b", "c"])
    view = merge_stats(view, EngineStats(adapters=[info("b", 5), info("d")], removed_adapters=["a", "never"]))
    assert [(one.name, one.requests) for one in view.adapters] == [("b", 5), ("c", 0), ("d", 0)]
    assert view.removed_adapters == []
    # Removed and registered anew between two messages.
    view = merge_stats(view, EngineStats(adapters=[info("b", 1)], removed_adapters=["b"]))
    assert [(one.name, one.requests) for one in view.adapters] == [("c", 0), ("d", 0), ("b", 1)]


def test_whatever_changes_the_view_is_the_whole() -> None:
    random.seed(3)
    truth: dict[str, AdapterInfo] = {}
    told: dict[str, AdapterInfo] = {}
    view = EngineStats()
    for step in range(300):
        for name in random.sample("abcdefgh", 2):
            if random.random() < 0.3:
                truth.pop(name, None)
            else:
                truth[name] = info(name, step)
        if random.random() < 0.5:
            changed = [one for name, one in truth.items() if told.get(name) != one]
            gone = [name for name in told if name not in truth]
            view, told = merge_stats(view, EngineStats(adapters=changed, removed_adapters=gone)), dict(truth)
            assert {one.name: one for one in view.adapters} == truth
