"""Engines for the laws: a plain one that tells the truth, and busy ones that must agree with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lawbook.cases import Case
from lawbook.fakes import fakes
from lawbook.mixes import SLOTS, Ask
from lawbook.zoo import Zoo
from specserve.config import EngineConfig
from specserve.core.messages import AddRequest
from specserve.core.seeds import derive_seed
from specserve.llm import LLM, Output
from specserve.speculation.proposer import Proposer

MAX_MODEL_LEN = 320
MAX_NUM_SEQS = 8
MAX_LORAS = 4
MAX_RANK = 16
MAX_STEPS = 20_000  # far beyond any law's need, waiting for adapters included


@dataclass
class Place:
    """Where busy engines compute, and in which dtype. Only in float64 do the laws promise every token."""

    device: str = "cpu"
    dtype: str = "float64"

    @property
    def exact(self) -> bool:
        return self.dtype == "float64"


HERE = Place()  # set by the options --law-device and --law-dtype


def open_engine(
    zoo: Zoo,
    *,
    draft: str | None = None,
    script: Sequence[tuple[int, ...]] = (),
    extra: Sequence[Proposer] = (),
    **fields: object,
) -> LLM:
    """An engine with every adapter of the zoo registered, that checks its integrity after every step; in float64 on a
    CPU unless the options of the laws or `fields` say otherwise.

    `draft` names a draft model of the zoo; `script` is what the fake proposers know, beside which there are `extra`
    ones; `fields` are EngineConfig's.
    """
    defaults: dict[str, object] = {
        "model": str(zoo.target),
        "draft_model": None if draft is None else str(zoo.drafts[draft]),
        "dtype": HERE.dtype,
        "device": HERE.device,
        "block_size": 8,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_NUM_SEQS,
        "num_blocks": MAX_NUM_SEQS * MAX_MODEL_LEN // 8 + 1,
        "max_loras": MAX_LORAS,
        "max_lora_rank": MAX_RANK,
        "loras": tuple((name, str(path)) for name, path in zoo.adapters[draft or "near"].items()),
        "check_integrity": True,
    }
    return LLM(EngineConfig(**(defaults | fields)), proposers=[*fakes(script), *extra])


def case_engine(zoo: Zoo, case: Case, truth: Sequence[tuple[int, ...]], **fields: object) -> LLM:
    """The engine that a case describes; `truth`: the full sequences expected, for the oracle."""
    last = case.proposer.split("+")[-1]
    draft = last.removesuffix("_draft") if last.endswith("_draft") else None
    slots = SLOTS.get(case.mix, MAX_LORAS)
    return open_engine(zoo, draft=draft, script=truth, pipeline_depth=case.depth, max_loras=slots, **fields)


def requests(batch: list[Ask], cuts: Sequence[tuple[int, ...]] = ()) -> list[AddRequest]:
    """The engine's own requests, named by their place; `cuts[i]` are tokens that request i has generated before."""
    return [
        AddRequest(
            request_id=str(index),
            prompt_ids=list(ask.prompt),
            params=ask.params,
            seed=derive_seed(ask.params.seed or 0, 0),
            lora=ask.lora,
            output_ids=list(cuts[index]) if cuts else [],
        )
        for index, ask in enumerate(batch)
    ]


def run_steps(
    llm: LLM, arrivals: Sequence[AddRequest], every: int = 0, between: Callable[[int], None] = lambda step: None
) -> dict[str, tuple[int, ...]]:
    """Drive the engine by hand: one arrival every so many steps (0: all at once), `between` before each step.

    Returns the tokens of each request by id, of those too that ended early.
    """
    queue = deque(arrivals)
    answers: dict[str, tuple[int, ...]] = {request.request_id: () for request in arrivals}
    step = 0
    while queue or llm.engine.has_work():
        while queue and (not every or step % every == 0):
            llm.engine.add_request(queue.popleft())
            if every:
                break
        between(step)
        llm.engine.poll_replies()
        for output in llm.engine.step():
            assert output.error is None, output.error
            answers[output.request_id] += tuple(output.token_ids)
        step += 1
        assert step < MAX_STEPS, "the engine has work and gets nowhere"
    return answers


def another_number(llm: LLM) -> Callable[[int], None]:
    """For `between` of run_steps: before every step every request gets another number of drafts, 0 to 8."""

    def change(step: int) -> None:
        for request in llm.engine.scheduler.requests.values():
            request.num_draft_tokens = (step * step // 3 + 5 * step + 2 * int(request.request_id)) % 9

    return change


def run(llm: LLM, batch: list[Ask]) -> list[Output]:
    """Submit all requests at once."""
    return llm.generate(
        [list(ask.prompt) for ask in batch], [ask.params for ask in batch], lora=[ask.lora or None for ask in batch]
    )


def tokens(outputs: list[Output]) -> list[tuple[int, ...]]:
    return [tuple(output.token_ids) for output in outputs]


def script_of(batch: list[Ask], answers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Full sequences: prompt and answer."""
    return [ask.prompt + answer for ask, answer in zip(batch, answers, strict=True)]
