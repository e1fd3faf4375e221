"""Is what is measured also right? The engine on the sensitive twin against a float32 reference, with negative controls.

    python -m benchmarks.twin TWIN --mode lora8_spec4 [--batches 1,8,32,128]

The engine runs the same mode and batch sizes as in the measurement, at pipeline depth 2, on prompts of different
lengths, and reports log-probabilities: of each of its tokens and of the most likely others. The reference computes the
same numbers teacher-forced on the engine's tokens. A row of the batch is right when

    |engine - reference| ≤ atol + rtol · |reference|   for each number,   and   mean |engine - reference| ≤ 0.7 rtol,

with (rtol, atol) = specserve_kernels.tolerances.MODEL of the engine's dtype; the comparison passes when every row is
right. The mean is what tells errors apart: in bf16 one large logit's rounding moves all of a position's numbers by up
to 0.03, but a row's mean stays near 0.01, where a wrong page of the cache makes it 0.1 and more. With a draft model,
the probabilities that it gave its drafts are compared in the same way, for sampled requests (greedy ones report none).
Where the engine quantises weights, the reference's are rounded in the same way: the loss is not what is judged here.

The same comparison must fail when
- adapters_exchanged: the reference computes each request with another adapter than it asked for;
- companions_exchanged: the same of the draft's adapters;
- page_replaced: while it decodes, one full page of one request's block table is replaced by block 0.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from msgspec import structs
from torch import Tensor

from benchmarks.draft_watch import DraftWatch
from benchmarks.engines import Mode, Setup, release_memory
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.reference import Reference
from benchmarks.shapes import load_settings
from specserve.core.sampling_params import MAX_LOGPROBS, SamplingParams, SpeculationParams
from specserve_kernels.tolerances import MODEL

# Between what rounding gives (a quarter of rtol, half at tiny widths) and what a wrong page gives (twice and more).
MEAN_SHARE = 0.7
FORCED = 4  # drafts a step beside the engine's choice
SHORTEST, SPREAD, STRIDE = 40, 73, 11  # prompt lengths: 40 … 112 tokens
NEW_TOKENS = 24
REPLACED_PAGE = 1  # of request 0, whose prompt is the shortest
MAX_WATCHED = 16  # requests whose drafts are compared
MAX_CONTROLLED = 16  # requests that are compared again with adapters exchanged
GREEDY = SamplingParams(temperature=0.0)
Cell = TypeVar("Cell", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Trial:
    """What the engine answered: logprobs[i] of tokens[i], from position starts[i] of sequences[i] on; rows[i] is the
    request that it belongs to."""

    rows: list[int]
    sequences: list[list[int]]
    adapters: list[str | None]
    starts: list[int]
    tokens: list[Tensor]  # per sequence [n, N]
    logprobs: list[Tensor]  # per sequence [n, N] float32
    accepted: int = 0  # drafts


def compare(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """The comparison above, one tensor of numbers a row: worst row's mean, largest error, and how many rows failed."""
    rtol, atol = MODEL[dtype]
    means, largest, failed = [], [], 0
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours - theirs).abs().nan_to_num(nan=float("inf"))
        means.append(error.mean().item())
        largest.append(error.max().item())
        failed += bool((error > atol + rtol * theirs.abs()).any()) or means[-1] > MEAN_SHARE * rtol
    return {
        "mean_err": round(max(means), 6), "max_err": round(max(largest), 6), "rows": len(means),
        "rows_failed": failed, "passed": failed == 0,
    }  # fmt: skip


def exchanged(adapters: Sequence[str | None], loras: int) -> list[str | None]:
    """Each request with its neighbour's adapter; with one adapter only, with none."""

    def other(name: str | None) -> str | None:
        if name is None or loras < 2:
            return None
        partner = int(name[1:]) ^ 1
        return f"a{partner if partner < loras else 0}"

    return [other(name) for name in adapters]


def prompts(batch: int, vocab: int) -> list[list[int]]:
    rng = random.Random(batch)
    return [[rng.randrange(vocab) for _ in range(SHORTEST + STRIDE * i % SPREAD)] for i in range(batch)]


def run_trial(
    engine: SpecserveEngine,
    adapters: Sequence[str | None],
    vocab: int,
    params: SamplingParams = GREEDY,
    *,
    replace_page: bool = False,
) -> Trial:
    """One batch with log-probabilities; `adapters` are its requests'. Of `params` the lengths are the trial's own."""
    asked = prompts(len(adapters), vocab)
    params = structs.replace(params, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=MAX_LOGPROBS)
    requests = engine.requests(asked, adapters, params)
    between = page_replacer(engine, requests[0].request_id) if replace_page else None
    sequels = engine.run(requests, between)
    return Trial(
        rows=list(range(len(adapters))),
        sequences=[prompt + sequel.token_ids for prompt, sequel in zip(asked, sequels, strict=True)],
        adapters=list(adapters),
        starts=[len(prompt) for prompt in asked],
        tokens=[torch.tensor([[e.token_id, *(token for token, _ in e.top)] for e in s.logprobs]) for s in sequels],
        logprobs=[torch.tensor([[e.logprob, *(value for _, value in e.top)] for e in s.logprobs]) for s in sequels],
        accepted=sum(sequel.speculation.accepted for sequel in sequels if sequel.speculation is not None),
    )


def page_replacer(engine: SpecserveEngine, request_id: str) -> Callable[[], None]:
    """Called between steps: once the request's prompt is computed, one page of its block table becomes block 0."""
    done = False

    def between() -> None:
        nonlocal done
        request = engine.core.scheduler.requests.get(request_id)
        if done or request is None or request.row is None or request.prefilling:
            return
        engine.core.built.runner.rows.block_tables[request.row, REPLACED_PAGE] = 0
        done = True

    return between


def watch_drafts(
    engine: SpecserveEngine, adapters: Sequence[str | None], vocab: int, num_drafts: int | None = None
) -> Trial | None:
    """One batch, sampled, with the probabilities that the draft model gave its drafts, as many a step (None: as the
    engine says); None if none could be seen."""
    asked = prompts(len(adapters), vocab)
    params = SamplingParams(
        temperature=1.0, max_tokens=NEW_TOKENS, ignore_eos=True,
        speculation=SpeculationParams(method="rejection", num_draft_tokens=num_drafts),
    )  # fmt: skip
    requests = engine.requests(asked, adapters, params)
    with DraftWatch(engine.core) as watch:
        sequels = engine.run(requests)
    numbers = {request.request_id: number for number, request in enumerate(requests[:MAX_WATCHED])}
    finals = [prompt + sequel.token_ids for prompt, sequel in zip(asked, sequels, strict=True)]
    # What a request drafts beyond its last token is for nobody, and may lie beyond its blocks.
    seen = [(numbers[r.request_id], r) for r in watch.rounds() if r.request_id in numbers]
    seen = [(number, r.up_to(len(finals[number]))) for number, r in seen if r.length < len(finals[number])]
    if not seen:
        return None
    return Trial(
        rows=[number for number, _ in seen],
        sequences=[finals[number][: r.length] + r.tokens.tolist() for number, r in seen],
        adapters=[adapters[number] for number, _ in seen],
        starts=[r.length for _, r in seen],
        tokens=[r.tokens.unsqueeze(1) for _, r in seen],
        logprobs=[r.logprobs.unsqueeze(1) for _, r in seen],
    )


def check_twin(
    setup: Setup, batches: Sequence[int], also: Callable[[SpecserveEngine], None] = lambda engine: None
) -> dict[int, dict[str, Any]]:
    """Batch size → the outcome, as rows carry it. An engine that chooses how much to draft, which may be nothing here,
    must also be right where it has to draft. `also` is called with the engine at the end."""
    chosen = {(batch, 0): setup.mode.adapters(batch) for batch in batches}
    forced = {(batch, FORCED): names for (batch, _), names in chosen.items() if setup.mode.drafts is None}
    found = check_cells(setup, chosen | forced, also, {cell: drafting(FORCED) for cell in forced})
    for batch, drafts in forced:
        add_forced(found[batch, 0], found[batch, drafts], drafts)
    return {batch: found[batch, 0] for batch in batches}


def drafting(drafts: int) -> SamplingParams:
    return structs.replace(GREEDY, speculation=SpeculationParams(num_draft_tokens=drafts))


def add_forced(outcome: dict[str, Any], forced: Mapping[str, Any], drafts: int) -> None:
    """An outcome passes if that with forced drafts does too, which it keeps."""
    outcome["passed"] &= forced["passed"]
    outcome["forced"] = {"k": drafts, **forced}


def check_cells(
    setup: Setup,
    cells: Mapping[Cell, Sequence[str | None]],
    also: Callable[[SpecserveEngine], None] = lambda engine: None,
    asked: Mapping[Cell, SamplingParams] = MappingProxyType({}),
) -> dict[Cell, dict[str, Any]]:
    """Each cell's outcome; a cell is a batch, given as its requests' adapters, and what they ask for, if that is not to
    be greedy and drafted for as the engine is set."""
    settings = load_settings(setup.pair)
    vocab = settings.shape("target").vocab - 256
    engine = SpecserveEngine(replace(setup, options={**setup.options, "pipeline_depth": 2}))
    ready = engine.core.ready
    dtype = getattr(torch, ready.dtype)
    try:
        run_trial(engine, setup.mode.adapters(max(8, setup.mode.loras)), vocab)  # every adapter is on the device
        right, wrong, drafts = {}, {}, {}
        for cell, adapters in cells.items():
            params = asked.get(cell, GREEDY)
            num_drafts = params.speculation.num_draft_tokens
            right[cell] = run_trial(engine, adapters, vocab, params)
            wrong[cell] = run_trial(engine, adapters, vocab, params, replace_page=True)
            if (
                setup.mode.speculates and num_drafts != 0 and params.greedy
            ):  # the watch samples; what sampled cells would show, greedy ones show
                drafts[cell] = watch_drafts(engine, adapters, vocab, num_drafts)
        also(engine)
    finally:
        engine.close()
        del engine
        release_memory()
    target = Judge(setup, "target", setup.loras, dtype, ready.quantization)
    outcomes = {cell: target.judge(right[cell], {"page_replaced": wrong[cell]}) for cell in cells}
    for cell, outcome in outcomes.items():
        if setup.mode.speculates:
            outcome["accepted"] = right[cell].accepted
    del target
    release_memory()
    if setup.mode.speculates:
        companions = {name: path / "draft" for name, path in setup.loras.items() if (path / "draft").exists()}
        judge = Judge(setup, "draft", companions, dtype, ready.draft_quantization or "none")
        for cell, trial in drafts.items():
            _add_draft(outcomes[cell], judge.judge(trial, {}) if trial is not None else None)
        del judge
        release_memory()
    return outcomes


def _add_draft(outcome: dict[str, Any], draft: dict[str, Any] | None) -> None:
    outcome["draft"] = draft
    if draft is not None:
        outcome["passed"] &= draft["passed"]
        outcome["controls_failed"] |= draft.pop("controls_failed")
        outcome["controls_err"] |= draft.pop("controls_err")


class Judge:
    """Compares trials with one model's reference, and sees that the controls fail."""

    def __init__(
        self, setup: Setup, role: str, loras: Mapping[str, Path], dtype: torch.dtype, quantization: str
    ) -> None:
        self.reference = Reference(setup.pair / role, loras, setup.device, quantization)
        self.exchange = "adapters_exchanged" if role == "target" else "companions_exchanged"
        self.dtype, self.loras = dtype, loras

    def judge(self, trial: Trial, spoiled: Mapping[str, Trial]) -> dict[str, Any]:
        """The trial must be right; with adapters exchanged, and for each spoiled trial, it must not. Of these only
        some requests are compared, of a spoiled trial request 0: that one of few is seen to be wrong says as much."""
        own = [name if name in self.loras else None for name in trial.adapters]  # some have no companion
        outcome = self.compare(trial, own)
        controls = {name: self.compare(_of(wrong, {0}), own[:1]) for name, wrong in spoiled.items()}
        dressed = sorted({row for row, name in zip(trial.rows, own, strict=True) if name is not None})
        if dressed:
            others = replace(trial, adapters=exchanged(own, len(self.loras)))
            few = _of(others, {*dressed[:MAX_CONTROLLED]})
            controls[self.exchange] = self.compare(few, few.adapters)
        outcome["controls_failed"] = {name: not control["passed"] for name, control in controls.items()}
        outcome["controls_err"] = {name: control["mean_err"] for name, control in controls.items()}
        outcome["passed"] &= all(outcome["controls_failed"].values())
        return outcome

    def compare(self, trial: Trial, adapters: Sequence[str | None]) -> dict[str, Any]:
        expected = self.reference.logprobs(trial.sequences, adapters, trial.starts, trial.tokens)
        return compare(_by_row(trial, trial.logprobs), _by_row(trial, expected), self.dtype)


def _of(trial: Trial, rows: Set[int]) -> Trial:
    """Only these requests."""
    places = [place for place, row in enumerate(trial.rows) if row in rows]
    lists = ("rows", "sequences", "adapters", "starts", "tokens", "logprobs")
    kept: dict[str, Any] = {name: [getattr(trial, name)[place] for place in places] for name in lists}
    return replace(trial, **kept)


def _by_row(trial: Trial, values: Sequence[Tensor]) -> list[Tensor]:
    rows = sorted(set(trial.rows))
    return [torch.cat([v for own, v in zip(trial.rows, values, strict=True) if own == row]) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("twin", type=Path)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    setup = Setup(args.twin, Mode.parse(args.mode), args.device, load_settings(args.twin).dtype)
    outcomes = check_twin(setup, [int(batch) for batch in args.batches.split(",")])
    for batch, outcome in outcomes.items():
        print(json.dumps({"mode": args.mode, "batch": batch, **outcome}))
    return int(not all(outcome["passed"] for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
