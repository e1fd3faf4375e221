"""Law: sampled tokens follow the target's own distribution, speculating, with an adapter, temperature and top-p.

The model's attention output is zeroed, so the next token depends on the last one alone and its distribution given each
is known exactly from transformers and peft. Tokens of one request are then a Markov chain, and the counts of what
follows each pair of tokens are multinomial: a χ² test over them also sees a dependence on how rounds were cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from lawbook.cases import Case
from lawbook.engines import open_engine, run, tokens
from lawbook.mixes import Ask, Lora, speculating
from lawbook.oracles import peft_model
from lawbook.zoo import Zoo, build_markov_zoo
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import SamplingParams

VOCAB = 12
NUM_REQUESTS = 1000
NUM_NEW = 102  # of which the first two begin the first pair
TEMPERATURE, TOP_P = 0.8, 0.85
SIGNIFICANCE = 1e-4
ADAPTER: Lora = (LoraRef("a2"),)


@pytest.fixture(scope="module")
def markov(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return build_markov_zoo(tmp_path_factory.mktemp("markov"), VOCAB)


def transitions(zoo: Zoo, lora: Lora, top_p: float) -> Tensor:
    """[vocab, vocab] float64: the distribution of the next token after each token, by transformers and peft."""
    with torch.inference_mode():
        logits = peft_model(zoo, lora, torch.float64)(torch.arange(VOCAB).unsqueeze(1)).logits[:, 0]
    probs = (logits / TEMPERATURE).softmax(-1)
    for row in probs:
        mass = 0.0
        for token in row.argsort(descending=True).tolist():
            if mass >= top_p:
                row[token] = 0.0
            mass += float(row[token])
    return probs / probs.sum(-1, keepdim=True)


def p_value(sequences: Sequence[tuple[int, ...]], expected: Tensor) -> float:
    """χ² over the counts [vocab, vocab, vocab] of triples, given their first two tokens; rare cells are pooled."""
    ids = torch.tensor(sequences)  # [N, L]
    triples = (ids[:, :-2] * VOCAB + ids[:, 1:-1]) * VOCAB + ids[:, 2:]
    counts = triples.flatten().bincount(minlength=VOCAB**3).view(VOCAB**2, VOCAB).double()
    wanted = counts.sum(-1, keepdim=True) * expected.repeat(VOCAB, 1)  # [pairs, vocab]
    if (counts[wanted == 0] > 0).any():
        return 0.0
    common = wanted >= 5
    rare_counts, rare_wanted = counts.where(~common, 0).sum(-1), wanted.where(~common, 0).sum(-1)
    pooled = rare_wanted >= 5
    statistic = ((counts - wanted) ** 2 / wanted)[common].sum()
    statistic += ((rare_counts - rare_wanted) ** 2 / rare_wanted)[pooled].sum()
    cells = common.sum(-1) + pooled
    freedom = (cells - 1).clamp(min=0).sum()
    return float(chi2.sf(statistic.item(), freedom.item()))


@pytest.mark.parametrize("method", ["rejection", "coupled"])
@pytest.mark.parametrize(
    ("proposer", "depth"),
    [
        ("near_draft", 2),
        pytest.param("near_draft", 1, marks=pytest.mark.laws_full),
        pytest.param("random", 2, marks=pytest.mark.laws_full),
        pytest.param("ngram", 2, marks=pytest.mark.laws_full),
        pytest.param("suffix", 1, marks=pytest.mark.laws_full),
        pytest.param("ngram+near_draft", 2, marks=pytest.mark.laws_full),
    ],
)
def test_samples_are_the_targets(proposer: str, method: str, depth: int, markov: Zoo) -> None:
    case = Case("llama", proposer, f"sampled-{method}", depth, "identical")
    batch = [
        Ask((index % VOCAB,), ADAPTER, SamplingParams(
            seed=index, max_tokens=NUM_NEW, temperature=TEMPERATURE, top_p=TOP_P, ignore_eos=True
        ))
        for index in range(NUM_REQUESTS)
    ]  # fmt: skip
    draft = "near" if proposer.endswith("near_draft") else None
    llm = open_engine(
        markov, draft=draft, pipeline_depth=depth, max_num_seqs=250, max_model_len=104, num_blocks=4000,
        max_num_batched_tokens=4096, check_integrity=False,
    )  # fmt: skip
    outputs = run(llm, speculating(batch, case, num_drafts=3))
    llm.engine.close()
    sequences = tokens(outputs)
    assert sum(len(text) - 2 for text in sequences) >= 100_000
    accepted = sum(output.speculation.accepted for output in outputs)
    drafted = sum(output.speculation.drafted for output in outputs)
    assert 0.1 * drafted < accepted < 0.95 * drafted
    assert p_value(sequences, transitions(markov, ADAPTER, TOP_P)) > SIGNIFICANCE
    # The same counts tell apart what a wrong engine would give.
    assert p_value(sequences, transitions(markov, (), TOP_P)) < SIGNIFICANCE
    assert p_value(sequences, transitions(markov, ADAPTER, 1.0)) < SIGNIFICANCE
