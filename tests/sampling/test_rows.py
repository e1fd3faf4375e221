"""SamplingRows: what is gathered is what was set, built once and rebuilt when a row changes."""

from __future__ import annotations

import math

import pytest
import torch

from specserve.core.sampling_params import SamplingParams, SpeculationParams
from specserve.sampling.rows import SamplingRows
from specserve_kernels.sampling.bad_words import ANY
from specserve_kernels.sampling.random import mix64

VOCAB = 50
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(seed=1, top_p=0.5)
UNSEEDED = SamplingParams(temperature=0.5, top_k=7, min_p=0.25, repetition_penalty=1.5)


@pytest.fixture
def rows() -> SamplingRows:
    rows = SamplingRows(8, VOCAB, "cpu", torch.float64)
    rows.set_row(3, GREEDY, seed=-5, stop_ids=(), prompt_len=4)
    rows.set_row(1, SEEDED, seed=6, stop_ids=(2,), prompt_len=5)
    rows.set_row(6, UNSEEDED, seed=2**62, stop_ids=(2,), prompt_len=6)
    return rows


def test_gathers_in_the_steps_order(rows: SamplingRows) -> None:
    batch = rows.gather([6, 3, 1])
    assert batch.device_rows.tolist() == [6, 3, 1]
    assert batch.temperature.tolist() == [0.5, 0.0, 1.0]
    assert batch.divisor.tolist() == [0.5, 1.0, 1.0]
    assert batch.top_k.tolist() == [7, VOCAB, VOCAB]
    assert batch.top_p.tolist() == [math.inf, math.inf, 0.5]
    assert batch.log_min_p.tolist() == [math.log(0.25), -math.inf, -math.inf]
    assert batch.repetition_penalty.tolist() == [1.5, 1.0, 1.0]
    assert batch.seed.tolist() == [mix64(2**62), mix64(-5), mix64(6)]
    assert batch.prompt_len.tolist() == [6, 4, 5]
    assert batch.is_coupled.tolist() == [False, False, True]
    assert batch.logit_bias is None and batch.forbidden is None


def test_flags_are_of_the_rows_gathered(rows: SamplingRows) -> None:
    greedy, seeded, both = rows.gather([3]), rows.gather([3, 1]), rows.gather([1, 6])
    assert not (greedy.any_sampled or greedy.any_penalty or greedy.any_temperature or greedy.any_top_p)
    assert (seeded.any_coupled, seeded.any_rejection, seeded.any_top_p) == (True, False, True)
    assert (seeded.any_temperature, seeded.any_min_p, seeded.max_top_k) == (False, False, 0)
    assert (both.any_coupled, both.any_rejection, both.any_temperature, both.any_penalty) == (True,) * 4
    assert (both.max_top_k, both.any_min_p, both.any_top_p_alone) == (7, True, True)


def test_steady_rows_are_built_once_and_a_change_is_seen(rows: SamplingRows) -> None:
    before = rows.gather([6, 1])
    assert rows.gather((6, 1)) is before
    rows.set_row(6, SEEDED, seed=9, stop_ids=(), prompt_len=2)
    after = rows.gather([6, 1])
    assert after.temperature.tolist() == [1.0, 1.0] and after.seed[0] == mix64(9)
    assert before.temperature.tolist() == [0.5, 1.0], "a step in flight keeps what it was given"
    for row in range(200):  # many different steps do not grow the cache without bound
        assert rows.gather([1] * row).device_rows.tolist() == [1] * row


def test_special_tokens_know_their_place_in_the_step(rows: SamplingRows) -> None:
    rows.set_row(0, SamplingParams(min_tokens=3, logit_bias={7: -1.5, 8: 2.0}), 0, (5, 2, 5), 1)
    batch = rows.gather([3, 0])
    assert batch.logit_bias is not None and batch.forbidden is not None
    assert batch.logit_bias.row.tolist() == [1, 1]
    assert batch.logit_bias.token.tolist() == [7, 8]
    assert batch.logit_bias.value.tolist() == [-1.5, 2.0]
    assert batch.forbidden.row.tolist() == [1, 1] and batch.forbidden.token.tolist() == [2, 5]
    assert batch.min_tokens.tolist() == [0, 3]


def test_words_know_their_place_in_the_step_and_end_in_one_column(rows: SamplingRows) -> None:
    rows.set_row(0, SamplingParams(bad_words_token_ids=((7,), (8, 9))), 0, (), 1)
    rows.set_row(2, SamplingParams(bad_words_token_ids=((4, 5, 6),)), 0, (), 1)
    batch = rows.gather([3, 0, 2, 1])
    assert batch.bad_words is not None
    assert batch.bad_words.row.tolist() == [1, 1, 2]
    assert batch.bad_words.tokens.tolist() == [[ANY, ANY, 7], [ANY, 8, 9], [4, 5, 6]]
    assert rows.gather([3, 1]).bad_words is None
    rows.set_row(0, GREEDY, 0, (), 1)
    assert rows.gather([3, 0]).bad_words is None, "a row keeps nothing of its former tenant"


def test_min_tokens_gives_way_where_words_leave_stop_tokens_alone() -> None:
    rows = SamplingRows(1, 3, "cpu")
    for words, forbidden in ((((0,),), True), (((0,), (0, 1)), False)):
        rows.set_row(0, SamplingParams(min_tokens=4, bad_words_token_ids=words), 0, (2,), 1)
        assert (rows.gather([0]).forbidden is not None) == forbidden


def test_history_is_read_only_where_a_processor_looks_back(rows: SamplingRows) -> None:
    lengths, history = torch.full((8,), 10), torch.zeros(8, 20, dtype=torch.int64)
    plain = rows.gather([3, 1])
    assert plain.with_history(lengths, history) is plain
    looking = rows.gather([1, 6]).with_history(lengths, history)
    assert looking.output_len is not None and looking.output_len.tolist() == [5, 4]
    assert looking.history is None
    assert looking.counts is not None and looking.counts.output[:, 0].tolist() == [5.0, 4.0]


def test_method() -> None:
    rows = SamplingRows(4, VOCAB, "cpu")
    rows.set_row(0, SamplingParams(seed=1, speculation=SpeculationParams(method="rejection")), 0, (), 0)
    rows.set_row(1, SamplingParams(), 0, (), 0, method="coupled")
    rows.set_row(2, SamplingParams(), 0, (), 0)
    rows.set_row(3, SamplingParams(temperature=1e-6), 0, (), 0)
    assert rows.gather([0, 1, 2]).is_coupled.tolist() == [False, True, False]
    almost = rows.gather([3])
    assert almost.temperature.tolist() == [0.0] and not almost.any_sampled
