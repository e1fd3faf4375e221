"""The draft model proposer with a model that is a table: next-token logits depend on the last token alone."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specserve.core.sampling_params import Method, SamplingParams
from specserve.sampling.rows import SamplingRows
from specserve.speculation.draft_model import DraftModelProposer
from specserve.speculation.proposer import DraftBatch, Drafts
from specserve_kernels.sampling.rejection import verify

VOCAB, WIDTH, DRAFTS = 6, 12, 3
TABLE = torch.tensor(
    [[((3 * row + 5 * column) % 7) / 2.5 for column in range(VOCAB)] for row in range(VOCAB)], dtype=torch.float64
)
PROMPT = (1, 4, 2)


class TableModel:
    """A draft forward over `batch.history`, which notes the positions that it was asked for."""

    def __init__(self, rows: Tensor, history: Tensor) -> None:
        self.rows, self.history = rows, history
        self.asked: list[Tensor] = []

    def __call__(self, positions: Tensor) -> Tensor:
        self.asked.append(positions)
        return TABLE[self.history[self.rows, positions[:, -1]]].clone()


def propose(
    params: SamplingParams, method: Method, prompts: list[tuple[int, ...]], num_drafts: tuple[int, ...]
) -> tuple[Drafts, TableModel, SamplingRows, Tensor]:
    count = len(prompts)
    sampling = SamplingRows(count, VOCAB, "cpu", torch.float64)
    history = torch.zeros(count, WIDTH, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        history[row, : len(prompt)] = torch.tensor(prompt)
        sampling.set_row(row, params, 1000 + row, (), len(prompt), method)
    rows, lengths = torch.arange(count), torch.tensor([len(prompt) for prompt in prompts])
    model = TableModel(rows, history)
    limits = torch.tensor(num_drafts)
    batch = DraftBatch(rows, num_drafts, limits, history, lengths, lengths, sampling.gather(range(count)), model)
    return DraftModelProposer().propose(batch), model, sampling, lengths


PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.2, top_p=0.7),
    SamplingParams(temperature=1.0, frequency_penalty=1.5, logit_bias={2: -100.0}),
]


@pytest.mark.parametrize("params", PARAMS, ids=["plain", "top_k", "top_p", "penalty"])
def test_tokens_are_drawn_from_q(params: SamplingParams) -> None:
    """χ² at every position, over rows that drafted the same tokens before it: there q is one distribution."""
    count = 6000
    drafts, _, _, _ = propose(params, "rejection", [PROMPT] * count, (DRAFTS,) * count)
    assert drafts.probs is not None
    for step in range(DRAFTS):
        head = drafts.tokens[0, :step]
        same = (drafts.tokens[:, :step] == head).all(1)
        q = drafts.probs[same, step]
        assert torch.allclose(q, q[0].expand_as(q), atol=1e-12)
        found = torch.bincount(drafts.tokens[same, step], minlength=VOCAB).double()
        possible = q[0] > 0
        assert found[~possible].sum() == 0
        assert same.sum() > 100
        assert chisquare(found[possible], q[0][possible] * found.sum()).pvalue > 1e-4


def test_q_is_the_processed_distribution() -> None:
    """Written out: temperature, and a frequency penalty that counts the drafts before."""
    params = SamplingParams(temperature=0.7, frequency_penalty=1.5)
    drafts, _, _, _ = propose(params, "rejection", [PROMPT, (5,)], (DRAFTS, DRAFTS))
    assert drafts.probs is not None
    for row, prompt in enumerate((PROMPT, (5,))):
        last = prompt[-1]
        counts = torch.zeros(VOCAB, dtype=torch.float64)
        for step in range(DRAFTS):
            want = ((TABLE[last] - 1.5 * counts) / 0.7).softmax(-1)
            assert torch.allclose(drafts.probs[row, step], want, atol=1e-12)
            last = int(drafts.tokens[row, step])
            counts[last] += 1


def test_passes_read_the_last_two_tokens_then_one() -> None:
    _, model, _, _ = propose(SamplingParams(temperature=0.0), "rejection", [PROMPT, (5,)], (3, 1))
    assert [asked.tolist() for asked in model.asked] == [[[1, 2], [0, 0]], [[3], [1]], [[4], [2]]]


def test_ragged_counts_and_greedy() -> None:
    drafts, model, _, _ = propose(SamplingParams(temperature=0.0), "rejection", [PROMPT, (5,)], (3, 1))
    assert drafts.probs is None and drafts.counts.tolist() == [3, 1]
    for row, prompt in enumerate((PROMPT, (5,))):
        last = prompt[-1]
        for step in range(int(drafts.counts[row])):
            last = int(TABLE[last].argmax())
            assert drafts.tokens[row, step] == last
            assert model.history[row, len(prompt) + step] == last


@pytest.mark.parametrize("method", ["coupled", "rejection"])
def test_own_distribution_is_accepted_whole(method: Method) -> None:
    """Verified by the very distributions that drafted, every draft passes: noise, positions and q fit together."""
    count = 50
    params = SamplingParams(temperature=1.0)
    drafts, model, sampling, lengths = propose(params, method, [PROMPT] * count, (DRAFTS,) * count)
    assert (drafts.probs is None) == (method == "coupled")
    seen = torch.cat((model.history[:, lengths[0] - 1 : lengths[0]], drafts.tokens), dim=1)  # [B, K+1]
    batch = sampling.gather(range(count))
    verified = verify(
        TABLE[seen], drafts.tokens, drafts.counts, drafts.probs, batch.seed, lengths, batch.temperature,
        batch.is_coupled, any_coupled=batch.any_coupled, any_rejection=batch.any_rejection,
    )  # fmt: skip
    assert verified.num_accepted.tolist() == [DRAFTS] * count
