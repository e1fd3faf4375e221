"""What the χ² of test_distribution.py is worth: with proposers that walk into the two traps of speculation it finds the
engine out with far fewer samples; with ones that only look as if they did it does not.

The traps (docs/architecture.md): whether a draft is verified must not depend on the draft itself, and q must be the
very distribution that it was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from lawbook.cases import Case
from lawbook.engines import open_engine, run, tokens
from lawbook.markov import judged, kept, transitions
from lawbook.mixes import Ask, Lora, speculating
from lawbook.zoo import MARKOV_VOCAB as VOCAB
from lawbook.zoo import Zoo
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams
from specserve.llm import Output
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve_kernels.sampling.tokens import draft_sample

ROWS = 300
NUM_NEW = 60
RIGHT, WRONG = 1e-3, 1e-7  # p-values above and below
FORBIDDEN = (4, 8)  # never drawn, for min_tokens is never reached; the proposers know nothing of that
PARAMS = SamplingParams(
    temperature=0.6, top_p=0.8, max_tokens=NUM_NEW, min_tokens=NUM_NEW, stop_token_ids=FORBIDDEN, ignore_eos=True
)
LORAS: tuple[Lora, ...] = ((), (LoraRef("a2"),))

Bad = Callable[[Tensor, Tensor], Tensor]
Claim = Callable[[Tensor, Tensor, Tensor], Tensor]


def nothing(q: Tensor, draft: Tensor) -> Tensor:
    return torch.zeros_like(draft, dtype=torch.bool)


def the_truth(raw: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    return q


@dataclass(frozen=True)
class FromTable:
    """Draws from a chain of its own, `raw` logits [V, V] of the next token given the last.

    `is_bad(q [B, V], draft [B])` → [B] bool: drafts that are cut off, with those that follow; `spares`: how many
    more are kept. `claim(raw [B, V], q [B, V], draft [B])` → [B, V]: what verification is told that it drew from.
    """

    raw: Tensor
    is_bad: Bad = nothing
    spares: int = 0
    claim: Claim = the_truth
    name: str = "table"
    location: Literal["device", "host"] = "device"
    keeps_kv: bool = False

    def propose(self, batch: DraftBatch) -> Drafts:
        sampling, last = batch.sampling, batch.history[batch.rows, batch.num_tokens - 1]
        drafts, claims, bad = [], [], []
        for step in range(batch.max_drafts):
            raw = self.raw[last]  # [B, V]
            q = kept(PARAMS, (raw / PARAMS.temperature).softmax(-1))
            position = batch.num_tokens + step
            last, _ = draft_sample(q.log(), sampling.seed, position, sampling.temperature, sampling.is_coupled)
            drafts.append(last)
            claims.append(self.claim(raw, q, last))
            bad.append(self.is_bad(q, last))
        good = (torch.stack(bad, 1).cumsum(1) == 0).sum(1)  # [B] before the first bad one
        return Drafts(torch.stack(drafts, 1), torch.minimum(good + self.spares, batch.limits), torch.stack(claims, 1))


def chance(q: Tensor, draft: Tensor) -> Tensor:
    return q.gather(1, draft[:, None])[:, 0]


def is_illegal(q: Tensor, draft: Tensor) -> Tensor:
    return torch.isin(draft, torch.tensor(FORBIDDEN))


def is_unsure(q: Tensor, draft: Tensor) -> Tensor:
    return chance(q, draft) < 0.3


def one_hot(raw: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    return torch.zeros_like(q).scatter(1, draft[:, None], 1.0)


BIASED: dict[str, dict[str, object]] = {
    "an illegal draft is cut": {"is_bad": is_illegal},
    "an unsure draft is cut": {"is_bad": is_unsure},
    "q is the raw softmax": {"claim": lambda raw, q, draft: raw.softmax(-1)},
    "q is before top_p": {"claim": lambda raw, q, draft: (raw / PARAMS.temperature).softmax(-1)},
    "q is of twice the temperature": {"claim": lambda raw, q, draft: (q.log() / 2).softmax(-1)},
}
EXACT: dict[str, dict[str, object]] = {
    "as it is": {},
    "what follows an unsure draft is cut": {"is_bad": is_unsure, "spares": 1},
    "drafts of a flat q are cut": {"is_bad": lambda q, draft: q.amax(-1) < 0.6},
    "q is one-hot": {"claim": one_hot},
}


def answers(zoo: Zoo, method: str, change: dict[str, object]) -> tuple[list[Ask], list[Output]]:
    near = Zoo(zoo.drafts["near"], {}, {})
    proposer = FromTable(transitions(near, (), VOCAB), **change)  # type: ignore[arg-type]
    llm = open_engine(
        zoo, draft="near", extra=[proposer], pipeline_depth=2, max_num_seqs=ROWS, max_model_len=NUM_NEW + 2,
        num_blocks=ROWS * (NUM_NEW // 8 + 2) + 1, check_integrity=False,
    )  # fmt: skip
    batch = batch_of(method)
    outputs = run(llm, batch)
    llm.engine.close()
    assert method == "none" or sum(output.speculation.accepted for output in outputs) > ROWS
    return batch, outputs


def batch_of(method: str) -> list[Ask]:
    rows = [replace(PARAMS, seed=index, speculation=NO_SPECULATION) for index in range(ROWS)]
    batch = [Ask((index % VOCAB,), LORAS[index % 2], params) for index, params in enumerate(rows)]
    case = Case("llama", "table", f"sampled-{method}", 2, "base")
    return batch if method == "none" else speculating(batch, case, num_drafts=3)


def p_with(zoo: Zoo, change: dict[str, object]) -> float:
    batch, outputs = answers(zoo, "rejection", change)
    return judged(batch, outputs, {lora: transitions(zoo, lora, VOCAB) for lora in LORAS})[0]


@pytest.mark.parametrize("name", BIASED)
def test_a_biased_rejection_is_found_out(name: str, markov: Zoo) -> None:
    assert p_with(markov, BIASED[name]) < WRONG


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in EXACT])
def test_what_leaves_rejection_exact_is_not(name: str, markov: Zoo) -> None:
    assert p_with(markov, EXACT[name]) > RIGHT


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in (*BIASED, *EXACT)])
def test_nothing_that_a_proposer_says_changes_what_is_coupled(name: str, markov: Zoo) -> None:
    _, plain = answers(markov, "none", {})
    _, outputs = answers(markov, "coupled", (BIASED | EXACT)[name])
    assert tokens(outputs) == tokens(plain)
