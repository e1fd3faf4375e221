"""The table of a distillation: its shares and their standard errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specserve.core.messages import SpeculationStats
from specserve.distillation.measure import Acceptance, Counted, counted
from specserve.distillation.ratios import ratio
from specserve.distillation.report import Report
from specserve.llm import Output


def test_the_error_is_the_spread_of_repeated_measurements() -> None:
    """Texts of unequal lengths, each with a rate of its own: the mean error is the deviation over many samples."""
    generator = torch.Generator().manual_seed(0)
    samples, texts = 2000, 40
    lengths = torch.randint(10, 100, (samples, texts), generator=generator).double()
    rates = 0.3 + 0.5 * torch.rand((samples, texts), generator=generator).double()
    parts = torch.binomial(lengths, rates, generator=generator)
    found = [ratio(y, x, range(texts)) for y, x in zip(parts.tolist(), lengths.tolist(), strict=True)]
    spread = torch.tensor([one.value for one in found]).std().item()
    assert sum(one.error or 0.0 for one in found) / samples == pytest.approx(spread, rel=0.05)
    tokens = lengths.sum(1).mean().item()
    assert spread > 1.5 * (0.55 * 0.45 / tokens) ** 0.5, "tokens of one text are no independent draws"


def test_by_hand() -> None:
    assert ratio([0, 4], [4, 4], "ab") == (0.5, (2 * (4 + 4)) ** 0.5 / 8)
    assert ratio([0, 4, 0, 4], [4] * 4, "abab") == ratio([0, 8], [8, 8], "ab")  # texts that come twice are no more
    assert ratio([0, 4], [4, 4], "aa") == (0.5, None)
    assert ratio([0, 0], [0, 0], "ab") == (0.0, None)


@pytest.mark.parametrize(("part", "most"), [(6, 1), (0, 1), (10, 1), (24, 4)])
def test_two_texts_alike_are_not_certain(part: int, most: int) -> None:
    value, error = ratio([part, part], [10, 10], "ab", most=most)
    rule = (2 * part + most) / 22
    assert (value, error) == (part / 10, (rule * (most - rule) / 20) ** 0.5)
    assert (error or 0.0) > 0.04 * most


def output(accepted: int, rounds: int, first: int) -> Output:
    stats = SpeculationStats(rounds, 4 * rounds, accepted, [rounds] * 4, [first, accepted - first, 0, 0])
    return Output("a", speculation=stats)


def test_what_the_engine_counted() -> None:
    found = counted([output(10, 10, 6), output(30, 10, 10)])
    assert (found.accepted, found.first_accepted, found.tokens_per_round) == (0.5, 0.8, 3.0)
    assert found.tokens_per_round_error == pytest.approx(1.0)  # 2 and 4 tokens a round
    assert found.accepted_error == pytest.approx(0.25)  # 25 % and 75 %
    alike = counted([output(10, 10, 6), output(30, 10, 10)], ["a", "a"])
    assert (alike.tokens_per_round, alike.tokens_per_round_error, alike.accepted_error) == (3.0, None, None)


def test_table() -> None:
    sure, unsure = Counted(0.5, 0.8, 3.0, 0.25, 1.0), Counted(0.5, 0.8, 3.0, None, None)
    report = Report(
        name="a", stored=Path("/a/draft"), work=Path("/w"), temperature=1.0, num_texts=9, num_tokens=90, num_held_out=2,
        too_long=0, seconds={},
        acceptance={
            "base draft": Acceptance(0.4, 0.0123, 0.3, None, sure, unsure),
            "after": Acceptance(0.5, 0.001, 0.6, 0.02, sure, sure),
        },
    )  # fmt: skip
    head, base, after, _, said, _ = report.text().splitlines()
    assert base.split() == [
        "base",
        "draft",
        "40.0%",
        "±1.2",
        "30.0%",
        "50.0%",
        "±25.0",
        "3.00",
        "±1.00",
        "50.0%",
        "3.00",
    ]
    assert after.split()[:5] == ["after", "50.0%", "±0.1", "60.0%", "±2.0"]
    assert len(head) == len(base) == len(after) <= 120
    assert "on 2 held-out texts, ± one standard error" in said
