"""How many tokens are drafted, in an engine whose drafts are accepted by chance and whose clock is a cost table: near
the best fixed number, wherever that is, and soon there again when the text changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from statistics import median

import pytest

from schedkit.simulation import CONTEXT, ROWS, Simulation, fixed_rate, gpu_like, h200_like, mixed_rate
from specserve.scheduling.acceptance import Acceptance, AcceptanceKey
from specserve.scheduling.cost_table import MAX_AUTO_DRAFTS, MAX_POSITIONS, CostTable
from specserve.scheduling.curve import Curve
from specserve.scheduling.draft_choice import Lengths, StepCosts
from specserve.scheduling.draft_policy import DraftPolicy
from specserve.scheduling.probing import SHARE

WARM = {1: 400, 8: 300, 32: 200, 128: 120}  # steps
STEPS = {1: 1500, 8: 500, 32: 300, 128: 120}
SMALL = 2.0  # milliseconds of a target's step beside which drafting is dear


def best_rate(costs: CostTable, rows: dict[float, int]) -> float:
    most = min(MAX_AUTO_DRAFTS, MAX_POSITIONS // sum(rows.values()) - 1)
    return max(fixed_rate(costs, rows, drafts) for drafts in range(most + 1))


def best_mixed_rate(costs: CostTable, rows: dict[float, int]) -> float:
    """With a number for each α."""
    lengths = product(range(MAX_AUTO_DRAFTS + 1), repeat=len(rows))
    return max(mixed_rate(costs, rows, dict(zip(rows, drafts, strict=True))) for drafts in lengths)


def dearer(costs: CostTable, times: float) -> CostTable:
    """The same with drafting that takes `times` as long."""
    draft = costs.drafting["draft"]
    first, further = (Curve((n, times * curve(n)) for n in ROWS) for curve in (draft.first, draft.further))
    return replace(costs, drafting={"draft": replace(draft, first=first, further=further)})


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("rows", [1, 8, 32, 128])
def test_steady_acceptance_reaches_the_best_fixed_number(rows: int, alpha: float) -> None:
    costs = gpu_like()
    run = Simulation(costs, {"x": alpha}, noise=0.03)
    run.add("x", rows)
    run.run(WARM[rows])
    assert run.rate(STEPS[rows]) >= 0.97 * best_rate(costs, {alpha: rows})
    assert run.changes("x", STEPS[rows]) <= 6 * STEPS[rows] / 100
    assert run.scheduler.policy.probing.spent <= SHARE * run.milliseconds


@pytest.mark.parametrize("seed", range(6))
def test_a_rise_while_drafting_is_followed_within_200_tokens(seed: int) -> None:
    costs = gpu_like()
    run = Simulation(costs, {"x": 0.3}, seed=seed)
    run.add("x")
    run.run(800)
    assert [step["x"] for step in run.chosen[-10:]].count(1) >= 9, "one may be a step without, to learn its cost"
    run.alphas["x"], tokens = 0.8, run.by_adapter["x"]
    while run.by_adapter["x"] < tokens + 200:
        run.step()
    drafts = max(step["x"] for step in run.chosen[-2:])
    assert fixed_rate(costs, {0.8: 1}, drafts) >= 0.95 * best_rate(costs, {0.8: 1})


@pytest.mark.parametrize("seed", range(4))
def test_a_rise_without_drafts_is_found_by_at_most_32_probed_rows(seed: int) -> None:
    costs = gpu_like(base=SMALL)
    run = Simulation(costs, {"x": 0.3}, seed=seed)
    for extra in range(8):
        run.add("x", total=400 + 10 * extra)
    run.run(1500)
    assert run.chosen[-1]["x"] == 0 and best_rate(costs, {0.3: 8}) == fixed_rate(costs, {0.3: 8}, 0)
    probing = run.scheduler.policy.probing
    run.alphas["x"], probes = 0.8, probing.probes
    while probing.probes < probes + 32 and not run.chosen[-1]["x"]:
        run.step()
    run.run(20)
    assert probing.probes <= probes + 32
    assert fixed_rate(costs, {0.8: 8}, max(step["x"] for step in run.chosen[-5:])) >= 0.95 * best_rate(costs, {0.8: 8})


def test_probing_takes_half_a_percent_of_the_time_at_most() -> None:
    """Measured by what steps with drafts really took longer, not by what the policy thinks."""
    costs = gpu_like(base=SMALL)
    run = Simulation(costs, {"x": 0.2})
    run.add("x", 8, total=400)
    run.run(1000)
    begin, spent, plain = run.milliseconds, 0.0, costs.decode(8)
    probes = run.scheduler.policy.probing.probes
    for _ in range(6000):
        before = run.milliseconds
        run.step()
        if all(row.start is None for row in run.last.rows):
            spent += max(0.0, run.milliseconds - before - plain)
    assert run.scheduler.policy.probing.probes - probes >= 10
    assert spent <= 1.05 * SHARE * (run.milliseconds - begin)


def test_mixed_adapters_draft_differently_and_beat_any_one_number() -> None:
    costs = gpu_like()
    run = Simulation(costs, {"low": 0.3, "high": 0.9})
    run.add("low", 16)
    run.add("high", 16)
    run.run(300)
    rate = run.rate(400)
    assert run.chosen[-1]["high"] >= run.chosen[-1]["low"] + 3
    assert rate >= 1.03 * best_rate(costs, {0.3: 16, 0.9: 16})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("base", "rows", "drafts"), [(6.0, 4, True), (3.0, 8, False)])
def test_a_rise_is_followed_in_a_mixed_batch(base: float, rows: int, drafts: bool, seed: int) -> None:
    """Beside rows of another adapter that draft all the time: within 200 tokens of the adapter if it drafts, and if it
    does not, after 32 probed rows of it at most."""
    costs = gpu_like(base=base)
    run = Simulation(costs, {"x": 0.3, "high": 0.9}, seed=seed)
    others = rows if drafts else 3 * rows
    for adapter, count in (("x", rows), ("high", others)):
        for extra in range(count):
            run.add(adapter, total=600 + 10 * extra)
    run.run(1200)
    seen = [step["x"] for step in run.chosen[-20:] if "x" in step and step.get("high")]
    assert (max(seen) > 0) == drafts
    run.alphas["x"], tokens, probed = 0.8, run.by_adapter["x"], run.count_probes()
    if drafts:
        while run.by_adapter["x"] < tokens + 200:
            run.step()
    else:
        while probed["x"] < 32 and not run.chosen[-1].get("x"):
            run.step()
        run.run(20)
        assert probed["x"] <= 32
    chosen = {alpha: max(step.get(name, 0) for step in run.chosen[-5:]) for alpha, name in ((0.8, "x"), (0.9, "high"))}
    held = {0.8: rows, 0.9: others}
    assert mixed_rate(costs, held, chosen) >= 0.95 * best_mixed_rate(costs, held)


def dressed_like(costs: CostTable) -> CostTable:
    """The same where verifications of more than 128 tokens take half as long again: beyond them products do not take
    adapters in."""

    def verified(rows: int, curve: Curve) -> Curve:
        widths = {rows + 1, *(rows * width for width in (2, 3, 5, 9))}
        return Curve((n, curve(n) * (1.5 if n > 128 else 1.0)) for n in widths)

    return replace(costs, verify=[(rows, verified(rows, curve)) for rows, curve in costs.verify])


def answers(run: Simulation, rows: int, drafts: int | None, out: int = 256) -> float:
    """Milliseconds of so many requests that come at once, prefill of both models counted."""
    begin = run.milliseconds
    run.add("x", rows, drafts=drafts, total=run.prompt + out)
    while run.scheduler.has_work:
        run.step()
    return run.milliseconds - begin


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.8, 0.9])
def test_a_full_batch_never_loses_by_drafting(alpha: float, known: bool) -> None:
    """Where drafts of few rows would pay and those of all do not; what the table does not know of steps with adapters
    is learnt by one such batch."""
    costs = gpu_like()
    run = Simulation(dressed_like(costs), {"x": alpha}, told=costs, noise=0.02, prompt=512, again=False)
    plain = answers(run, 128, 0)
    if known:
        run.scheduler.policy.install(costs, dressed_like(costs))
    else:
        answers(run, 128, None)
    assert answers(run, 128, None) <= plain / 0.98


@pytest.mark.parametrize(("rows", "alpha"), [(8, 0.5), (8, 0.8), (32, 0.8), (128, 0.9)])
def test_answers_that_drafting_makes_shorter_are(rows: int, alpha: float) -> None:
    """Beside the best fixed number of drafts; the first batch, which finds out what drafts are worth, left out."""

    def some(drafts: int | None) -> float:
        run = Simulation(gpu_like(), {"x": alpha}, noise=0.02, prompt=512, again=False, seed=1)
        return sum([answers(run, rows, drafts) for _ in range(6)][1:])

    best = min(some(drafts) for drafts in range(5))
    assert best < some(0) / 1.03, "or there is nothing to be won"
    assert some(None) <= 1.04 * best


def measured(rows: int, drafts: int | None, alphas: Sequence[float], size: tuple[int, int], seed: int) -> list[float]:
    """Milliseconds of a batch for each α, in one engine, twice, after a short warm-up; what it knows of acceptance is
    exchanged with α, as in benchmarks/speculation_curve.py. An 8B as it was timed: no table says that contexts make
    steps longer, nor that draft prefill takes half as long again; and all answers begin at once, so that the last of
    them draft alone, and who is accepted least ends the batch."""
    prompt, out = size
    run = Simulation(
        h200_like(), {"x": 0.0}, noise=0.02, again=False, depth=2, context=CONTEXT, catching_up=1.5, seed=seed
    )
    known = {alpha: Acceptance() for alpha in alphas}
    taken = []
    for run.prompt, tokens in ((64, 16), (prompt, out), (prompt, out)):
        answers(run, rows, 0, tokens)
        for alpha in alphas:
            run.alphas["x"], run.scheduler.policy.acceptance = alpha, known[alpha]
            taken.append(answers(run, rows, drafts, tokens))
    return taken[len(alphas) :]


SIZES = ((256, 128), (512, 256))  # tokens in, tokens out
ALPHAS = (0.3, 0.5, 0.7, 0.9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_whole_answers_are_never_slower_for_drafts(rows: int, size: tuple[int, int]) -> None:
    """The median of several batches at each acceptance, and no single one by much; prefill of both models counts."""
    if rows > 64 and size != SIZES[0]:
        pytest.skip("takes long, and nothing drafts there")
    seeds = range(5) if rows <= 16 else range(3) if rows <= 32 else range(1)
    ratios: dict[float, list[float]] = {alpha: [] for alpha in ALPHAS}
    for seed in seeds:
        plain, taken = (measured(rows, drafts, ALPHAS, size, seed) for drafts in (0, None))
        for place, (without, chosen) in enumerate(zip(plain, taken, strict=True)):
            ratios[ALPHAS[place % len(ALPHAS)]].append(without / chosen)
    for alpha, seen in ratios.items():
        assert median(seen) >= 0.98, alpha
        assert min(seen) >= 0.92, alpha


@pytest.mark.parametrize("alpha", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("rows", [1, 8])
def test_clear_gains_are_kept(rows: int, alpha: float) -> None:
    """Beside the best fixed number of drafts, over several batches."""

    def some(drafts: int | None) -> float:
        return sum(sum(measured(rows, drafts, [alpha], SIZES[0], seed)) for seed in range(8))

    best = min(some(drafts) for drafts in range(1, MAX_AUTO_DRAFTS + 1))
    assert best < some(0) / 1.05, "or there is nothing to be won"
    assert some(None) <= 1.06 * best


def test_a_gain_within_the_margin_is_none() -> None:
    """What is said to gain 2 % is not begun; what gains 4 % is not begun either, but goes on."""
    costs = StepCosts(8, 1, [4.0] + 8 * [4.0], {"draft": 9 * [1.0]}, {"draft": 9 * [1.0]})
    policy = DraftPolicy({"draft": True}, gpu_like())
    estimate = policy.acceptance.get(AcceptanceKey((), "greedy", "draft"))
    for drafting, gain, drafts in ((True, 1.02, 0), (False, 1.04, 0), (True, 1.04, 1), (False, 1.06, 1)):
        policy._drafting = drafting
        found = Lengths((1,), 8 * 1.25 * gain, 5.0)
        assert policy._if_worthwhile({estimate: 8}, found, costs).drafts == (drafts,)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_flood_ends_drafting(depth: int) -> None:
    run = Simulation(gpu_like(), {"x": 0.8}, depth=depth)
    run.add("x", 4)
    assert run.run(100).chosen[-1]["x"] >= 3
    run.add("x", 252)
    assert [step["x"] for step in run.run(30).chosen[-20:]] == [0] * 20


@pytest.mark.parametrize("times", [0.25, 4.0])
@pytest.mark.parametrize("alpha", [0.3, 0.7])
@pytest.mark.parametrize("rows", [1, 8])
def test_step_times_correct_a_wrong_table(rows: int, alpha: float, times: float) -> None:
    told = gpu_like()
    costs = dearer(told, times)
    run = Simulation(costs, {"x": alpha}, told=told, noise=0.03)
    run.add("x", rows)
    run.run(2500)
    assert run.rate(1000) >= 0.96 * best_rate(costs, {alpha: rows})


def test_requests_that_name_a_number_get_it_beside_others() -> None:
    run = Simulation(gpu_like(), {"asked": 0.1, "none": 0.9, "free": 0.9})
    run.add("asked", 2, drafts=5)
    run.add("none", 2, drafts=0)
    run.add("free", 2)
    chosen = run.run(100).chosen[-1]
    assert chosen["asked"] == 5 and chosen["none"] == 0 and chosen["free"] >= 4


def test_draft_prefill_that_costs_more_than_it_saves_is_left() -> None:
    """A short answer at the end of a long prompt."""
    run = Simulation(gpu_like(), {"x": 0.9}, prompt=8000)
    run.add("x", total=8000 + 8)
    run.run(6)
    assert all(step.get("x", 0) == 0 for step in run.chosen)
    run = Simulation(gpu_like(), {"x": 0.9}, prompt=8000)
    run.add("x", total=8000 + 800)
    assert run.run(6).chosen[-1]["x"] >= 4
