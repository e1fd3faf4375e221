"""Law: sampled tokens follow the target's own distribution, speculating, with adapters, whatever a request asks for.

The model's attention output is zeroed, so what follows each token is known exactly from transformers and peft, and what
a request asks to be done to it is computed over its whole text. One batch mixes adapters with companions, no adapters,
and every field that changes the distribution; each set of fields is held by a χ² of its own. The full product has 10⁶
samples a case. That the same test finds wrong engines is shown in test_biased.py.
"""

from __future__ import annotations

import pytest

from lawbook.cases import Case
from lawbook.engines import open_engine, run
from lawbook.markov import judged, transitions
from lawbook.mixes import Ask, Lora, speculating
from lawbook.zoo import MARKOV_VOCAB as VOCAB
from lawbook.zoo import Zoo
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import SamplingParams
from specserve.llm import Output

ROWS = 600
NUM_NEW = 60
FEW, MANY = 30_000, 1_000_000  # samples of a case
SIGNIFICANCE = 1e-4
LORAS: tuple[Lora, ...] = ((), (LoraRef("a2"),), (LoraRef("a2", 0.5),))
FIELDS: tuple[dict[str, object], ...] = (
    {"temperature": 0.8, "top_p": 0.85},
    {"temperature": 1.0, "top_k": 5, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.3, "logit_bias": {3: 1.0, 7: -2.0}},
    {"temperature": 1.0, "presence_penalty": 0.8, "frequency_penalty": 0.1, "bad_words_token_ids": ((9,), (3, 5, 6))},
    {"temperature": 1.1, "min_tokens": 40, "stop_token_ids": (4,)},
    {
        "temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "min_tokens": 40, "stop_token_ids": (1,),
        "repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logit_bias": {5: 1.0},
        "bad_words_token_ids": ((5, 5), (5, 6), (2, 2, 2)),
    },
)  # fmt: skip


def batch_of(first: int) -> list[Ask]:
    """ROWS requests from number `first` on: every set of fields with every choice of adapters and first token."""
    return [
        Ask((index % VOCAB,), LORAS[index // len(FIELDS) % len(LORAS)], SamplingParams(
            seed=index, max_tokens=NUM_NEW, ignore_eos=True, **FIELDS[index % len(FIELDS)]
        ))
        for index in range(first, first + ROWS)
    ]  # fmt: skip


def sampled(zoo: Zoo, case: Case, samples: int) -> tuple[list[Ask], list[Output]]:
    draft = "near" if case.proposer.endswith("near_draft") else None
    llm = open_engine(
        zoo, draft=draft, pipeline_depth=case.depth, max_num_seqs=ROWS, max_model_len=NUM_NEW + 2,
        num_blocks=ROWS * (NUM_NEW // 8 + 2) + 1, max_num_batched_tokens=8192, check_integrity=False,
    )  # fmt: skip
    batch: list[Ask] = []
    outputs: list[Output] = []
    while sum(len(output.token_ids) for output in outputs) < samples:
        batch += (more := batch_of(len(batch)))
        outputs += run(llm, speculating(more, case, num_drafts=3))
    llm.engine.close()
    return batch, outputs


PROPOSERS = ("near_draft", "random", "ngram", "suffix", "ngram+near_draft")


@pytest.mark.parametrize("method", ["rejection", "coupled"])
@pytest.mark.parametrize(
    ("proposer", "depth", "samples"),
    [
        ("near_draft", 2, FEW),
        *(pytest.param(name, 2, MANY, marks=pytest.mark.laws_full) for name in PROPOSERS),
        pytest.param("near_draft", 1, MANY, marks=pytest.mark.laws_full),
    ],
)
def test_samples_are_the_targets(proposer: str, method: str, depth: int, samples: int, markov: Zoo) -> None:
    case = Case("llama", proposer, f"sampled-{method}", depth, "identical")
    batch, outputs = sampled(markov, case, samples)
    accepted = sum(output.speculation.accepted for output in outputs)
    drafted = sum(output.speculation.drafted for output in outputs)
    assert 0.1 * drafted < accepted < 0.95 * drafted
    logits = {lora: transitions(markov, lora, VOCAB) for lora in LORAS}
    kinds = [slice(kind, None, len(FIELDS)) for kind in range(len(FIELDS))]
    found = [judged(batch[kind], outputs[kind], logits) for kind in kinds]
    assert sum(count for _, count in found) >= samples
    assert min(p for p, _ in found) > SIGNIFICANCE, found
    # The same samples tell apart what an engine would give that ignores scales, or the fields of a request.
    unscaled = {lora: logits[LORAS[1] if lora else ()] for lora in LORAS}
    assert all(judged(batch[kind], outputs[kind], unscaled)[0] < SIGNIFICANCE for kind in kinds)
    others = [batch[(index + 1) % len(FIELDS) :: len(FIELDS)] for index in range(len(FIELDS))]
    swapped = [
        [Ask(ask.prompt, ask.lora, other.params) for ask, other in zip(batch[kind], asks, strict=True)]
        for kind, asks in zip(kinds, others, strict=True)
    ]
    assert all(judged(asks, outputs[kind], logits)[0] < SIGNIFICANCE for asks, kind in zip(swapped, kinds, strict=True))
