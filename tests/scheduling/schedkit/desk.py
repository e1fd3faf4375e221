"""Desk: a scheduler with its fakes around it, stepped by hand."""

from __future__ import annotations

from collections import Counter

from schedkit.adapters import FakeAdapters
from schedkit.device import FakeDevice, truth
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.request import Request
from specserve.scheduling.scheduler import Scheduler

BLOCK_SIZE = 4


class Desk:
    """`tokens`: generated so far by each kind, a request's name up to its first digit; `started` and `ended`: names in
    order."""

    def __init__(
        self, adapters: FakeAdapters | None = None, *, rows: int = 4, blocks: int = 4000, budget: int = 200
    ) -> None:
        self.adapters = adapters or FakeAdapters()
        self.device = FakeDevice(self.adapters, block_size=BLOCK_SIZE, budget=budget)
        self.kv = KVCacheManager(blocks, BLOCK_SIZE, enable_prefix_caching=False)
        self.scheduler = Scheduler(
            self.kv, self.adapters, max_num_seqs=rows, max_num_batched_tokens=budget, draft_kv={}
        )
        self.tokens: Counter[str] = Counter()
        self.started: list[str] = []
        self.ended: list[str] = []

    def add(self, name: str, *lora: str, prompt: int = 4, answer: int = 8) -> Request:
        request = Request(
            request_id=name, prompt_len=prompt, token_ids=[truth(1, p) for p in range(prompt)], seed=1,
            params=SamplingParams(), stop_ids=(), max_total=prompt + answer,
            lora=tuple(LoraRef(adapter) for adapter in lora),
        )  # fmt: skip
        self.device.totals[name] = prompt + answer
        self.scheduler.add(request)
        return request

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            waiting = {request.request_id for request in self.scheduler.waiting if not request.epoch}
            plan = self.scheduler.schedule()
            self.started += [row.request_id for row in plan.rows if row.request_id in waiting]
            if not plan.empty:
                for output in self.scheduler.commit(self.device.execute(plan)):
                    self.tokens[output.request_id.rstrip("0123456789")] += len(output.token_ids)
                    self.ended += [output.request_id] if output.finish_reason else []
            self.scheduler.check_integrity()
            self.adapters.tick()

    def steps_until(self, *names: str, limit: int = 2000) -> int:
        """How many steps it takes until all of these have ended."""
        for count in range(limit):
            if set(names) <= set(self.ended):
                return count
            self.step()
        raise AssertionError(f"{set(names) - set(self.ended)} never ended")
