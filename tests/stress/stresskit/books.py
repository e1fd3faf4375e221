"""The engine's figures held against the test's own: what statistics and /metrics show, and that nothing is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import SimpleNamespace

from specserve.core.messages import AdapterInfo, EngineStats, RequestOutput
from specserve.engine.client.statistics import merge_stats
from specserve.llm import LLM
from stresskit.ledger import Ledger
from stresskit.traffic import Asked

SETTLING = 3  # steps after which an aborted request has left the device


class Books:
    """Counters of what the test asked and heard, by name and life of the name; unloading ends a life."""

    def __init__(self, llm: LLM, ledger: Ledger) -> None:
        self.engine, self.ledger = llm.engine, ledger
        self.num_slots = llm.config.max_loras
        self.max_rows = llm.config.max_num_seqs
        self.max_bytes = llm.config.max_host_lora_bytes
        self.over_budget = 0
        self._lives: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[tuple[str, int]] = Counter()
        self._all_tokens = 0
        self._seen = EngineStats()
        self._adapters: dict[str, AdapterInfo] = {}  # as a client sees them
        self._leaving: list[tuple[int, Asked]] = []

    # --- what the test knows ----------------------------------------------------------------------------------------

    def arrived(self, names: set[str]) -> frozenset[tuple[str, int]]:
        lives = frozenset((name, self._lives[name]) for name in names)
        self._requests.update(lives)
        return lives

    def heard(self, asked: Asked, output: RequestOutput) -> None:
        self._all_tokens += len(output.token_ids)
        for life in asked.lives:
            self._tokens[life] += len(output.token_ids)

    def left(self, asked: Asked) -> None:
        """It has ended; a step in flight may still use its adapters."""
        self._leaving.append((self.engine.scheduler.stats.steps + SETTLING, asked))

    def forgotten(self, name: str) -> None:
        self._lives[name] += 1

    # --- what the engine says ---------------------------------------------------------------------------------------

    def check(self, live: Iterable[Asked]) -> None:
        stats = self._stats()
        self._leaving = [(until, asked) for until, asked in self._leaving if until > stats.steps]
        live = [*live, *(asked for _, asked in self._leaving)]
        assert stats.num_running + stats.num_waiting <= len(live)
        assert stats.num_running <= self.max_rows
        assert stats.generation_tokens == self._all_tokens
        assert self._adapters.keys() == self.ledger.names.keys()
        for info in self._adapters.values():
            life = info.name, self._lives[info.name]
            assert (info.requests, info.tokens) == (self._requests[life], self._tokens[life]), info
            self.ledger.see(info)
        self._check_memory(live)
        _check_exposition(stats)

    def _stats(self) -> EngineStats:
        """As a client sees them: of adapters an engine tells what changed."""
        self._seen = stats = merge_stats(self._seen, self.engine.stats())
        self._adapters = {info.name: info for info in stats.adapters}
        listed = {info.name: info for info in self.engine.adapters.list()}
        assert listed == self._adapters, "the statistics miss a change"
        return stats

    def _check_memory(self, live: list[Asked]) -> None:
        """Within the budget, or nothing is there but what requests hold, and what is pinned."""
        tiers = self._seen.adapter_tiers
        used = tiers.host_bytes
        listed = {info.version: info for info in self._adapters.values() if info.tier != "disk"}
        assert sum(info.num_bytes or 0 for info in listed.values()) <= used
        assert (
            sum(info.slot is not None for info in listed.values()) <= tiers.slots_used <= tiers.slots == self.num_slots
        )
        if used <= self.max_bytes:
            return
        self.over_budget += 1
        needed = {meaning for asked in live for meaning in asked.meanings}
        sizes = [self.ledger.size(meaning) for meaning in needed]
        pinned = sum(info.num_bytes or 0 for info in self._adapters.values() if info.pinned)
        if None not in sizes:
            assert used <= pinned + sum(size or 0 for size in sizes), "more than requests need, beyond the budget"

    def check_empty(self) -> None:
        """All is unloaded and every request has ended."""
        self.check([])
        stats, adapters, scheduler = self._stats(), self.engine.adapters, self.engine.scheduler
        assert (stats.num_running, stats.num_waiting, stats.adapters) == (0, 0, [])
        assert stats.num_free_blocks == stats.num_blocks
        assert (stats.adapter_tiers.host_bytes, stats.adapter_tiers.slots_used) == (0, 0)
        assert (adapters.num_reading, adapters.num_loading) == (0, 0)
        assert sorted(scheduler.free_rows) == list(range(self.max_rows))
        scheduler.kv.pool.check_integrity([])
        self.engine.check_integrity()


def _check_exposition(stats: EngineStats) -> None:
    """What /metrics shows of each name; where the server's dependencies are missing there is no /metrics."""
    try:
        from prometheus_client.core import CollectorRegistry  # noqa: PLC0415

        from specserve.server.metrics import EngineCollector  # noqa: PLC0415
    except ImportError:
        return
    registry = CollectorRegistry()
    registry.register(EngineCollector(SimpleNamespace(stats=stats, live=[]), "base", 1))
    for info in stats.adapters:
        for field in ("requests", "tokens", "drafted", "accepted"):
            shown = registry.get_sample_value(f"specserve:adapter_{field}_total", {"adapter": info.name})
            assert shown == getattr(info, field), (info, field, shown)
    shown = {sample.labels["adapter"] for family in registry.collect() for sample in family.samples
             if "adapter" in sample.labels}  # fmt: skip
    assert shown == {info.name for info in stats.adapters}
