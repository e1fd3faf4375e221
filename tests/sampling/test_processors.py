"""Each processor, and all in their order, against transformers' processors and plain Python, position by position."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specserve.core.sampling_params import SamplingParams
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.counts import token_counts
from specserve.sampling.processors import PROCESSORS, process
from specserve.sampling.rows import SamplingRows

NUM_DRAFTS = 3
STOP_IDS = (1, 4)
OFF = SamplingParams()
WORDS = ((3,), (8, 7, 5), (8, 7, 9), (8, 4), (7, 7, 6), (8, 7, 7, 2), (7, 3, 1, 6))
CASES = {
    "bad_words": [
        OFF, SamplingParams(bad_words_token_ids=WORDS), SamplingParams(bad_words_token_ids=((0,),)),
        SamplingParams(bad_words_token_ids=WORDS[-2:]), SamplingParams(bad_words_token_ids=WORDS[1:3] * 2),
    ],
    "min_tokens": [SamplingParams(min_tokens=n) for n in (0, 5, 6, 7, 8, 99)],
    "logit_bias": [OFF, SamplingParams(logit_bias={0: 100.0, 3: -2.5}), SamplingParams(logit_bias={3: -100.0})],
    "repetition": [SamplingParams(repetition_penalty=x) for x in (1.0, 1.3, 0.7, 2.0)],
    "frequency": [SamplingParams(frequency_penalty=x) for x in (0.0, 0.5, -1.0, 2.0)],
    "presence": [SamplingParams(presence_penalty=x) for x in (0.0, 0.5, -1.0, 2.0)],
    "temperature": [SamplingParams(temperature=x) for x in (1.0, 0.0, 0.3, 2.0)],
    "min_p": [SamplingParams(min_p=x) for x in (0.0, 0.05, 0.4, 1.0)],
    "top_k": [SamplingParams(top_k=x) for x in (0, -1, 1, 7, 39, 40, 1000)],
    "top_p": [SamplingParams(top_p=x) for x in (1.0, 0.99, 0.7, 0.1, 1e-9)],
    "top_k_top_p": [
        OFF,
        SamplingParams(top_k=6, top_p=0.6),
        SamplingParams(top_k=2, top_p=0.99),
        SamplingParams(top_p=0.8),
        SamplingParams(top_k=3),
    ],
    "all": [
        OFF,
        SamplingParams(
            min_tokens=7, logit_bias={1: 9.0, 5: -1.0}, repetition_penalty=1.2, frequency_penalty=0.3,
            presence_penalty=-0.4, temperature=0.8, min_p=0.02, top_k=20, top_p=0.9, bad_words_token_ids=WORDS,
        ),
        SamplingParams(min_tokens=6, logit_bias={4: 3.0}, repetition_penalty=0.8, temperature=1.7, top_p=0.95),
        SamplingParams(temperature=0.0, presence_penalty=1.0, min_tokens=9, top_k=2, top_p=0.5, min_p=0.5),
    ],
}  # fmt: skip


class Situation:
    """Rows with histories of unlike lengths, drafts and logits; device rows in another order than the batch's."""

    def __init__(self, params: list[SamplingParams], vocab: int = 40, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(len(params) * vocab)
        num_rows = len(params)
        self.params, self.device_rows = params, [(row * 2 + 1) % (2 * num_rows) for row in range(num_rows)]
        self.prompts = [
            list(torch.randint(0, vocab, (3 + row,), generator=generator).tolist()) for row in range(num_rows)
        ]
        self.outputs = [list(torch.randint(0, vocab, (5,), generator=generator).tolist()) for _ in range(num_rows)]
        self.drafts = torch.randint(0, vocab, (num_rows, NUM_DRAFTS), generator=generator)
        self.drafts[:, 1] = self.drafts[:, 0]  # a token drafted twice counts twice
        for row, one in enumerate(params):
            if one.bad_words_token_ids:  # so that some of WORDS have begun, in the output and in the drafts
                self.outputs[row][-1] = 8
                self.drafts[row] = torch.tensor([7, 7, 9])
        shape = (num_rows, NUM_DRAFTS + 1, vocab)
        self.logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype)
        self.rows = SamplingRows(2 * num_rows, vocab, "cpu", dtype)
        self.history = torch.full((2 * num_rows, 30), -1)  # what is past the end is no token
        self.lengths = torch.zeros(2 * num_rows, dtype=torch.int64)
        for row, (prompt, output) in enumerate(zip(self.prompts, self.outputs, strict=True)):
            place = self.device_rows[row]
            self.rows.set_row(place, params[row], 0, STOP_IDS, len(prompt))
            self.history[place, : len(prompt) + len(output)] = torch.tensor(prompt + output)
            self.lengths[place] = len(prompt) + len(output)

    def batch(self) -> SamplingBatch:
        return self.rows.gather(self.device_rows).with_history(self.lengths, self.history, max_length=25)

    def processed(self) -> Tensor:
        return process(self.logits, self.batch(), self.drafts)

    def expected(self) -> Tensor:
        rows = [
            [self._expected_at(row, position) for position in range(self.logits.shape[1])]
            for row in range(len(self.params))
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def _expected_at(self, row: int, position: int) -> Tensor:
        params, scores = self.params[row], self.logits[row, position].clone()
        output = self.outputs[row] + self.drafts[row, :position].tolist()
        tokens = torch.tensor([self.prompts[row] + output])
        if params.bad_words_token_ids:
            words = NoBadWordsLogitsProcessor([list(word) for word in params.bad_words_token_ids])
            scores = words(torch.tensor([output]), scores[None])[0]
        stop = MinNewTokensLengthLogitsProcessor(len(self.prompts[row]), params.min_tokens, list(STOP_IDS))
        scores = stop(tokens, scores[None])[0]
        for token, bias in params.logit_bias.items():
            scores[token] += bias
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(tokens, scores[None])[0]
        for token, times in Counter(output).items():
            scores[token] -= params.frequency_penalty * times + params.presence_penalty
        warpers: list[LogitsProcessor] = []
        if params.temperature > 0:
            warpers = [TemperatureLogitsWarper(params.temperature), MinPLogitsWarper(params.min_p)]
            warpers += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
            warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1.0 else []
        for warper in warpers:
            scores = warper(tokens, scores[None])[0]
        return scores


@pytest.mark.parametrize("vocab", [40, 700])  # fewer and more than are sorted at once
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, vocab: int) -> None:
    situation = Situation(CASES[case], vocab)
    raw = situation.logits.clone()
    processed = situation.processed()
    torch.testing.assert_close(processed, situation.expected(), rtol=1e-12, atol=1e-12)
    assert torch.equal(situation.logits, raw), "the raw logits are still needed"
    assert not torch.equal(processed, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_processed_in_float32(dtype: torch.dtype) -> None:
    situation = Situation(CASES["all"], dtype=torch.float32)
    situation.logits = situation.logits.to(dtype)
    processed = situation.processed()
    situation.logits = situation.logits.float()
    assert processed.dtype == torch.float32
    torch.testing.assert_close(processed, situation.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bad_words", "min_tokens", "repetition", "frequency", "all"])
def test_the_drafts_own_step_sees_what_verification_sees(case: str) -> None:
    """One position after D drafts (the draft model's step) equals position D of verification."""
    situation = Situation(CASES[case])
    together = situation.processed()
    for step in range(NUM_DRAFTS + 1):
        alone = process(situation.logits[:, step : step + 1], situation.batch(), situation.drafts[:, :step])
        assert torch.equal(alone, together[:, step : step + 1])


def test_positions_past_a_rows_drafts_may_hold_anything() -> None:
    situation = Situation(CASES["all"])
    together = situation.processed()
    situation.drafts[:, 1:] = torch.tensor([-1, 2**40])
    assert torch.equal(situation.processed()[:, :2], together[:, :2])


def keep_by_hand(logits: list[float], top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    weights = [math.exp(logits[token]) for token in order]
    kept, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights):
            break
        kept.add(token)
        mass += weight
    return kept


@pytest.mark.parametrize("vocab", [16, 600])
def test_ties_go_to_the_lower_token_id(vocab: int) -> None:
    generator = torch.Generator().manual_seed(3)
    settings = [(3, 1.0), (0, 0.6), (9, 0.7), (0, 0.93), (1, 1.0), (0, 1.0)]
    params = [SamplingParams(top_k=top_k, top_p=top_p) for top_k, top_p in settings]
    rows = SamplingRows(len(params), vocab, "cpu", torch.float64)
    for row, one in enumerate(params):
        rows.set_row(row, one, 0, (), 0)
    logits = torch.randint(-3, 2, (len(params), 5, vocab), generator=generator).double() * 1.7
    no_drafts = torch.zeros(len(params), 4, dtype=torch.int64)
    processed = process(logits, rows.gather(range(len(params))), no_drafts)
    for row, (top_k, top_p) in enumerate(settings):
        for position in range(5):
            kept = set(torch.isfinite(processed[row, position]).nonzero().flatten().tolist())
            expected = keep_by_hand(logits[row, position].tolist(), top_k, top_p if top_p < 1 else 2.0)
            assert kept == expected, (row, position)


@pytest.mark.parametrize("sharpness", [0.1, 3.0])  # candidates that are not enough, and that are
def test_top_p_is_the_same_by_candidates_and_by_sorting(sharpness: float) -> None:
    vocab = 2000
    logits = torch.randn(6, 2, vocab, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * sharpness
    rows = SamplingRows(6, vocab, "cpu", torch.float64)
    for row, top_p in enumerate((0.3, 0.5, 0.8, 0.9, 0.95, 1.0)):
        rows.set_row(row, SamplingParams(top_p=top_p), 0, (), 0)
    processed = process(logits, rows.gather(range(6)), torch.zeros(6, 1, dtype=torch.int64))
    for row, top_p in enumerate((0.3, 0.5, 0.8, 0.9, 0.95)):
        expected = TopPLogitsWarper(top_p)(torch.zeros(2, 0), logits[row])
        assert torch.equal(processed[row], expected)
    assert torch.equal(processed[5], logits[5])


def test_token_counts_are_a_counters() -> None:
    situation = Situation([OFF] * 5)
    prompt_lens = torch.tensor([len(prompt) for prompt in situation.prompts])
    place = torch.tensor(situation.device_rows)
    counts = token_counts(situation.history[place], situation.lengths[place], prompt_lens, 40)
    for row in range(5):
        output = Counter(situation.outputs[row])
        assert counts.output[row].tolist() == [output[token] for token in range(40)]
        assert counts.prompt[row].tolist() == [token in situation.prompts[row] for token in range(40)]


def test_nothing_is_computed_that_no_row_asks_for() -> None:
    situation = Situation([SamplingParams(temperature=0.0, top_k=5, top_p=0.5, min_p=0.2), OFF])
    batch = situation.batch()
    assert [one.name for one in PROCESSORS if one.is_active(batch)] == []
    assert process(situation.logits, batch, situation.drafts) is situation.logits


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(min_tokens=50, temperature=1e-4, top_p=1e-9, min_p=1.0, top_k=1),
        SamplingParams(logit_bias=dict.fromkeys(range(6), -100.0), repetition_penalty=100.0, temperature=100.0),
        SamplingParams(min_tokens=50, temperature=1e-30),
        SamplingParams(min_tokens=50, bad_words_token_ids=tuple((token,) for token in range(5))),
    ],
)
def test_some_token_always_stays(params: SamplingParams) -> None:
    """Extreme settings, and a vocabulary of stop tokens only, leave a distribution to sample from."""
    vocab = 6
    rows = SamplingRows(1, vocab, "cpu")
    rows.set_row(0, params, 0, range(vocab), 2)
    history = torch.zeros(1, 8, dtype=torch.int64)
    batch = rows.gather([0]).with_history(torch.tensor([4]), history)
    logits = torch.linspace(-300, 300, 4 * vocab).view(1, 4, vocab)
    probs = process(logits, batch, torch.zeros(1, 3, dtype=torch.int64)).softmax(-1)
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 4))
