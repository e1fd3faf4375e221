"""An engine without models: the real scheduler, drafts that are accepted by chance, and a clock that a cost table
drives."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from itertools import pairwise

from schedkit.adapters import FakeAdapters
from specserve.core.messages import LoraRef
from specserve.core.plan import PlanRow, RowResult, StepPlan, StepResult
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.cost_table import CostTable, DraftCosts
from specserve.scheduling.curve import Curve
from specserve.scheduling.kv_cache_manager import KVCacheManager
from specserve.scheduling.probing import Price
from specserve.scheduling.request import Request
from specserve.scheduling.scheduler import Scheduler

ENDLESS, BLOCK_SIZE = 1 << 20, 1 << 12
ROWS = (1, 8, 32, 128, 256)


def gpu_like(*, base: float = 6.0, token: float = 0.02, dear_from: int = 320, dear: float = 0.06) -> CostTable:
    """A large target and a draft of an eighth of it: tokens are cheap up to `dear_from` a step."""

    def verified(rows: int) -> Curve:
        widths = {rows + 1, *(rows * width for width in (2, 3, 5, 9))}
        return Curve((n, base + 0.3 + token * n + dear * max(0.0, n - dear_from)) for n in widths)

    return CostTable(
        decode=Curve((rows, base + token * rows) for rows in ROWS),
        verify=[(rows, verified(rows)) for rows in ROWS],
        drafting={
            "draft": DraftCosts(
                first=Curve((rows, 0.9 + 0.004 * rows) for rows in ROWS),
                further=Curve((rows, 0.7 + 0.004 * rows) for rows in ROWS),
                catch_up=Curve([(1, 0.8), (64, 1.0), (512, 2.5)]),
            )
        },
    )  # fmt: skip


def h200_like() -> CostTable:
    """An 8B and a 1B in bfloat16 on an H200, at no context, from measured rounds: more than 256 tokens are dear."""
    verified = {
        1: [(2, 3.98), (5, 4.0), (8, 4.05)],
        8: [(9, 4.25), (16, 4.3), (40, 4.65), (64, 5.1)],
        32: [(33, 4.6), (64, 4.8), (128, 5.4), (160, 5.9), (256, 8.4)],
        128: [(129, 6.4), (256, 8.7), (384, 13.0), (512, 17.0)],
        256: [(257, 10.2), (512, 17.0)],
    }
    a_pass = Curve([(1, 0.92), (8, 0.95), (32, 1.0), (128, 1.35), (256, 1.9)])
    return CostTable(
        decode=Curve([(1, 3.92), (8, 4.02), (32, 4.22), (64, 4.7), (128, 5.6), (256, 9.1)]),
        verify=[(rows, Curve(points)) for rows, points in verified.items()],
        drafting={"draft": DraftCosts(a_pass, a_pass, catch_up=Curve([(16, 0.9), (256, 1.3), (1024, 3.4)]))},
    )


CONTEXT = 3.2e-5  # milliseconds: 128 KB of KV a token at 4 TB/s


def expected(alpha: float, drafts: int) -> float:
    """Tokens of a round: 1 + α + … + α^k."""
    return sum(alpha**position for position in range(drafts + 1))


def fixed_rate(costs: CostTable, rows: Mapping[float, int], drafts: int) -> float:
    """Tokens a millisecond when every row drafts so many; `rows` by their α."""
    return mixed_rate(costs, rows, dict.fromkeys(rows, drafts))


def mixed_rate(costs: CostTable, rows: Mapping[float, int], drafts: Mapping[float, int]) -> float:
    """Tokens a millisecond when the rows of each α draft `drafts[α]`."""
    total, drafting = sum(rows.values()), sum(rows[alpha] for alpha in rows if drafts[alpha])
    tokens = sum(count * expected(alpha, drafts[alpha]) for alpha, count in rows.items())
    verified = total + sum(rows[alpha] * drafts[alpha] for alpha in rows)
    return tokens / (costs.target(total, verified) + costs.draft("draft", drafting, max(drafts.values())))


class Simulation:
    """`alphas`: chance that a draft is accepted, by adapter; it may change while it runs. `costs` is what steps really
    take, `told` what the scheduler's table says. `again`: whoever is done is followed by another like it. What
    no table says: `context` milliseconds a step takes longer for each token of the rows' contexts, a pass of the draft
    a quarter of that, and draft prefill takes `catching_up` times as long."""

    def __init__(
        self, costs: CostTable, alphas: dict[str, float], *, told: CostTable | None = None, seed: int = 0,
        depth: int = 1, noise: float = 0.0, prompt: int = 32, again: bool = True,
        context: float = 0.0, catching_up: float = 1.0,
    ) -> None:  # fmt: skip
        self.costs, self.alphas, self.depth, self.noise, self.prompt = costs, alphas, depth, noise, prompt
        self.again, self.context, self.catching_up = again, context, catching_up
        self.random = random.Random(seed)
        self.scheduler = Scheduler(
            KVCacheManager(2000, BLOCK_SIZE, enable_prefix_caching=False), FakeAdapters(16),
            max_num_seqs=256, max_num_batched_tokens=1 << 14, draft_kv={"draft": True}, costs=told or costs,
        )  # fmt: skip
        self.tickets: deque[tuple[StepPlan, StepResult, float]] = deque()
        self.milliseconds = 0.0
        self.tokens = 0
        self.last = StepPlan(step_id=0, rows=[])
        self.by_adapter: dict[str, int] = dict.fromkeys(alphas, 0)
        self.adapter_of: dict[str, str] = {}
        self.totals: dict[str, int] = {}
        self.chosen: list[dict[str, int]] = []  # a step: drafts by adapter, of rows that did not probe

    def add(self, adapter: str, count: int = 1, *, drafts: int | None = None, total: int = ENDLESS) -> None:
        for _ in range(count):
            name = str(len(self.adapter_of))
            self.adapter_of[name], self.totals[name] = adapter, total
            self.scheduler.add(Request(
                request_id=name, prompt_len=self.prompt, token_ids=[1] * self.prompt, params=SamplingParams(), seed=0,
                stop_ids=(), max_total=total, proposer="draft", num_draft_tokens=drafts, lora=(LoraRef(adapter),),
            ))  # fmt: skip

    def run(self, steps: int) -> Simulation:
        for _ in range(steps):
            self.step()
        return self

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.empty:
            self.scheduler.adapters.begin(plan.adapter_loads)  # type: ignore[attr-defined]
            result = StepResult(step_id=plan.step_id, rows=[self._row(row) for row in plan.rows])
            taken = self.price(plan) * self.random.uniform(1.0 - self.noise, 1.0 + self.noise)
            self.tickets.append((plan, result, taken))
            self.chosen.append(self._chosen(plan))
            self.last = plan
        while self.tickets and (plan.empty or len(self.tickets) >= self.depth):
            _, result, taken = self.tickets.popleft()
            self.milliseconds += taken
            for output in self.scheduler.commit(result, taken):
                self.tokens += len(output.token_ids)
                adapter = self.adapter_of[output.request_id]
                self.by_adapter[adapter] += len(output.token_ids)
                if output.finish_reason is not None and self.again:  # somebody else comes
                    self.add(adapter, total=self.totals[output.request_id])

    def price(self, plan: StepPlan) -> float:
        """What the step really takes: its rows as one forward, drafting, and the draft's prefill."""
        rows = [row for row in plan.rows if row.start is None]
        drafting = [row.num_drafts for row in rows if row.num_drafts]
        behind = sum(row.draft_prefill for row in rows)
        prefill = sum(row.num_new for row in plan.rows if row.start is not None)
        taken = self.costs.target(len(rows), len(rows) + sum(drafting)) if rows else self.costs.decode(1)
        taken += self.costs.draft("draft", len(drafting), max(drafting, default=0)) + 0.02 * prefill
        contexts = sum((1.0 + 0.25 * row.num_drafts) * row.context_bound for row in rows)
        return taken + self.catching_up * self.costs.catch_up("draft", behind) + self.context * contexts

    def _row(self, row: PlanRow) -> RowResult:
        if not row.samples:
            return RowResult(token_ids=[])
        alpha, accepted = self.alphas[self.adapter_of[row.request_id]], 0
        while accepted < row.num_drafts and self.random.random() < alpha:
            accepted += 1
        return RowResult(token_ids=[1] * (accepted + 1), num_drafted=row.num_drafts, num_accepted=accepted)

    def _chosen(self, plan: StepPlan) -> dict[str, int]:
        """The least of each adapter's rows: a probe is one row of several."""
        found: dict[str, int] = {}
        for row in plan.rows:
            if row.start is None:
                adapter = self.adapter_of[row.request_id]
                found[adapter] = min(found.get(adapter, row.num_drafts), row.num_drafts)
        return found

    def rate(self, steps: int) -> float:
        """Tokens a millisecond over the next so many steps."""
        tokens, milliseconds = self.tokens, self.milliseconds
        self.run(steps)
        return (self.tokens - tokens) / (self.milliseconds - milliseconds)

    def count_probes(self) -> Counter[str]:
        """Rows that are probed from now on, by adapter."""
        probing, counts = self.scheduler.policy.probing, Counter[str]()
        pick = probing.pick

        def counted(requests: Iterable[Request], price: Price) -> list[Request]:
            picked = pick(requests, price)
            counts.update(self.adapter_of[request.request_id] for request in picked)
            return picked

        probing.pick = counted  # type: ignore[method-assign]
        return counts

    def changes(self, adapter: str, last: int) -> int:
        """How often the number of drafts changed within the last steps."""
        seen = [step[adapter] for step in self.chosen[-last:] if adapter in step]
        return sum(a != b for a, b in pairwise(seen))
