"""The scheduler as a state machine over a fake device that computes lengths only: requests come, are aborted, preempted
and finish at depth 1 and 2, and after every step its invariants hold, every request ends with the right tokens, and
nothing leaks."""

from __future__ import annotations

import random
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specserve.core.messages import LoraRef
from specserve.core.plan import AdapterLoad, RowResult, StepPlan, StepResult
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.request import Request
from specserve.scheduling.scheduler import Scheduler

BLOCK_SIZE, NUM_BLOCKS, ROWS, BUDGET, MAX_LEN = 4, 12, 3, 11, 40


class NoAdapters:
    """Adapters that need nothing."""

    def acquire(self, refs: tuple[LoraRef, ...]) -> tuple[()]:
        return ()

    def prepare(self, uses: object) -> bool:
        return True

    def take_slots(self, uses: object) -> tuple[tuple[()], list[AdapterLoad]]:
        return (), []

    def release_slots(self, uses: object) -> None: ...
    def release(self, uses: object) -> None: ...
    def cache_key(self, uses: object) -> list[tuple[str, float]]:
        return []

    def count_tokens(self, uses: object, tokens: int, drafted: int, accepted: int) -> None: ...


def truth(seed: int, position: int) -> int:
    """The token that request `seed` has at a position: what the fake model would say."""
    return (seed * 31 + position * 7) % 100 + 1


class FakeDevice:
    """Keeps true lengths per row as the runner does, checks every plan, accepts a random number of drafts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lengths: dict[int, int] = {}
        self.seeds: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.draft_computed: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.totals: dict[str, int] = {}  # by request

    def execute(self, plan: StepPlan) -> StepResult:
        assert plan.num_tokens + sum(row.draft_prefill for row in plan.rows) <= BUDGET
        for new in plan.new_rows:
            self.lengths[new.row], self.seeds[new.row] = len(new.token_ids), new.seed
            self.computed[new.row], self.draft_computed[new.row] = new.num_computed, new.num_draft_computed
            self.tables[new.row] = []
            assert new.token_ids[new.prompt_len :] == [
                truth(new.seed, p) for p in range(new.prompt_len, len(new.token_ids))
            ]
        for change in plan.blocks:
            table = self.tables[change.row]
            assert len(table) == change.start, "block table has a hole"
            table += change.block_ids
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        return StepResult(step_id=plan.step_id, rows=[self.run_row(row) for row in plan.rows])

    def run_row(self, row) -> RowResult:  # type: ignore[no-untyped-def]
        length, k = self.lengths[row.row], row.num_drafts
        capacity = len(self.tables[row.row]) * BLOCK_SIZE
        if row.start is not None:
            assert row.start == self.computed[row.row] or row.start == length - 1
            self.computed[row.row] = row.start + row.num_new
            assert capacity >= self.computed[row.row]
            if not row.samples:
                return RowResult(token_ids=[])
            assert self.computed[row.row] == length
        else:
            assert self.computed[row.row] == length - 1, "decoding before the prefill ended"
            assert capacity >= min(length + k, self.totals[row.request_id])
        self.draft_computed[row.row] += row.draft_prefill
        if k and row.proposer == "draft":
            assert self.draft_computed[row.row] >= length - 2, "drafting over a gap in the draft's KV"
        accepted = self.random.randint(0, k)
        tokens = [truth(self.seeds[row.row], length + j) for j in range(accepted + 1)]
        self.lengths[row.row] += accepted + 1
        if row.start is None:
            self.computed[row.row] += accepted + 1
        if k and row.proposer == "draft":
            self.draft_computed[row.row] = length + min(accepted, k - 1)
        return RowResult(token_ids=tokens, num_drafted=k, num_accepted=accepted)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(depth=st.integers(1, 2), seed=st.integers(0, 1000), caching=st.booleans())
    def start(self, depth: int, seed: int, caching: bool) -> None:
        self.kv = KVCacheManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=caching)
        self.scheduler = Scheduler(
            self.kv,
            NoAdapters(),
            max_num_seqs=ROWS,
            max_num_batched_tokens=BUDGET,
            draft_kv={"draft": True, "ngram": False},
        )
        self.depth, self.device = depth, FakeDevice(seed)
        self.tickets: deque[StepResult] = deque()
        self.counter = 0
        self.expected: dict[str, tuple[Request, list[int]]] = {}
        self.got: dict[str, list[int]] = {}

    @rule(
        prompt=st.integers(1, 20), shared=st.booleans(), answer=st.integers(1, 20), k=st.integers(0, 4),
        proposer=st.sampled_from(["draft", "ngram"]), resumed=st.integers(0, 5),
    )  # fmt: skip
    def add(self, prompt: int, shared: bool, answer: int, k: int, proposer: str, resumed: int) -> None:
        self.counter += 1
        seed = 1 if shared else self.counter
        total = min(prompt + answer, MAX_LEN)
        known = min(prompt + resumed, total - 1)
        if known < prompt:
            return
        name = str(self.counter)
        request = Request(
            request_id=name, prompt_len=prompt, token_ids=[truth(seed, p) for p in range(known)], seed=seed,
            params=SamplingParams(), stop_ids=(), max_total=total, proposer=proposer if k else None, num_draft_tokens=k,
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

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.empty:
            self.tickets.append(self.device.execute(plan))
        if self.tickets and (plan.empty or len(self.tickets) >= self.depth):
            for output in self.scheduler.commit(self.tickets.popleft()):
                self.receive(output.request_id, output.token_ids, output.finish_reason)
        self.scheduler.check_integrity()

    def receive(self, name: str, tokens: list[int], finish: str | None) -> None:
        assert name in self.expected, "an aborted request emitted"
        self.got[name] += tokens
        want = self.expected[name][1]
        assert self.got[name] == want[: len(self.got[name])]
        if finish is not None:
            assert finish == "length" and self.got[name] == want
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


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
