"""The scheduler as a state machine over a fake device that computes lengths only: requests come, are aborted, preempted
and finish at depth 1 and 2, some with as many drafts as erratic step times suggest, on adapters that are read and
copied in their own time into fewer slots than there are names. After every step its invariants hold, every request ends
with the right tokens, and nothing leaks."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from schedkit.adapters import FakeAdapters
from schedkit.device import FakeDevice, truth
from schedkit.simulation import gpu_like
from specserve.core.messages import LoraRef
from specserve.core.plan import StepResult
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.request import Request
from specserve.scheduling.scheduler import Scheduler

BLOCK_SIZE, NUM_BLOCKS, ROWS, BUDGET, MAX_LEN = 4, 12, 3, 11, 40
SLOTS = 2
NAMES = ("a", "b", "c", "d", "bad")


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.integers(1, 2), seed=st.integers(0, 1000), caching=st.booleans(), read_steps=st.integers(0, 3),
        load_steps=st.integers(0, 3), base=st.sampled_from([0.5, 2.0, 10.0]),
    )  # fmt: skip
    def start(self, depth: int, seed: int, caching: bool, read_steps: int, load_steps: int, base: float) -> None:
        self.adapters = FakeAdapters(SLOTS, read_steps=read_steps, load_steps=load_steps)
        self.kv = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            self.kv,
            self.adapters,
            max_num_seqs=ROWS,
            max_num_batched_tokens=BUDGET,
            draft_kv={"draft": True, "ngram": False},
            costs=gpu_like(base=base),
        )
        self.depth = depth
        self.device = FakeDevice(self.adapters, block_size=BLOCK_SIZE, budget=BUDGET, seed=seed)
        self.tickets: deque[StepResult] = deque()
        self.counter = 0
        self.expected: dict[str, tuple[Request, list[int]]] = {}
        self.got: dict[str, list[int]] = {}

    @rule(
        prompt=st.integers(1, 20), shared=st.booleans(), answer=st.integers(1, 20), k=st.integers(0, 4) | st.none(),
        proposer=st.sampled_from(["draft", "ngram"]), resumed=st.integers(0, 5),
        lora=st.lists(st.sampled_from(NAMES), max_size=SLOTS),
    )  # fmt: skip
    def add(
        self, prompt: int, shared: bool, answer: int, k: int | None, proposer: str, resumed: int, lora: list[str]
    ) -> None:
        self.counter += 1
        seed = 1 if shared else self.counter
        total = min(prompt + answer, MAX_LEN)
        known = min(prompt + resumed, total - 1)
        if known < prompt:
            return
        name = str(self.counter)
        request = Request(
            request_id=name, prompt_len=prompt, token_ids=[truth(seed, p) for p in range(known)], seed=seed,
            params=SamplingParams(), stop_ids=(), max_total=total, proposer=None if k == 0 else proposer,
            num_draft_tokens=k, lora=tuple(LoraRef(name) for name in lora),
        )  # fmt: skip
        self.expected[name] = (request, [truth(seed, p) for p in range(known, total)])
        self.got[name] = []
        self.device.totals[name] = total
        self.scheduler.add(request)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.scheduler.abort(name)
        del self.expected[name]

    @rule(name=st.sampled_from(NAMES))
    def reload(self, name: str) -> None:
        self.adapters.reload(name)

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.empty:
            self.tickets.append(self.device.execute(plan))
        if self.tickets and (plan.empty or len(self.tickets) >= self.depth):
            for output in self.scheduler.commit(self.tickets.popleft(), self.device.random.uniform(0.5, 20.0)):
                self.receive(output.request_id, output.token_ids, output.finish_reason)
        for output in self.scheduler.take_failed():
            self.receive(output.request_id, [], output.finish_reason)
        self.scheduler.check_integrity()
        self.adapters.tick()

    def receive(self, name: str, tokens: list[int], finish: str | None) -> None:
        assert name in self.expected, "an aborted request emitted"
        self.got[name] += tokens
        want = self.expected[name][1]
        assert self.got[name] == want[: len(self.got[name])]
        if finish is not None:
            broken = any(ref.name == "bad" for ref in self.expected[name][0].lora)
            assert finish == ("error" if broken else "length") and self.got[name] == ([] if broken else want)
            del self.expected[name]

    @invariant()
    def alive(self) -> None:
        if hasattr(self, "scheduler"):
            assert set(self.scheduler.requests) == set(self.expected)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "requests never finished"
        assert not self.expected
        self.kv.pool.check_integrity([])
        assert len(self.scheduler.free_rows) == ROWS
        self.adapters.check_unused()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
