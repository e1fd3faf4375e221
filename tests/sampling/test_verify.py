"""Verification row by row: against a plain-Python reading of the two methods, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specserve_kernels.sampling.random import Stream, gumbel, uniform
from specserve_kernels.sampling.rejection import Verified, residual_logits, verify
from specserve_kernels.sampling.tokens import draft_sample, sample

VOCAB = 11


def make_batch(num_rows: int, num_drafts: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows of every kind: greedy, coupled and rejection, drafts from q or the likeliest, 0 to K of them."""
    generator = torch.Generator().manual_seed(num_rows * 100 + num_drafts)
    row = torch.arange(num_rows)
    processed = torch.randn(num_rows, num_drafts + 1, VOCAB, generator=generator, dtype=dtype) * 2
    processed[row % 5 == 1, :, 3:6] = float("-inf")
    q = (processed[:, :-1] + torch.randn(num_rows, num_drafts, VOCAB, generator=generator, dtype=dtype)).softmax(-1)
    drafts = q.argmax(-1)
    if num_drafts:
        drawn = q.reshape(-1, VOCAB).multinomial(1, generator=generator).view(num_rows, num_drafts)
        drafts = torch.where(row[:, None] % 2 == 0, drafts, drawn)
    return {
        "processed": processed,
        "drafts": drafts,
        "draft_counts": torch.randint(0, num_drafts + 1, (num_rows,), generator=generator),
        "draft_probs": q,
        "seed": row * 31 - 40,
        "first_position": row * 13 % 50,
        "temperature": (row % 3 > 0).to(dtype) * 0.7,
        "is_coupled": row % 4 < 2,
    }


def expected_row(batch: dict[str, Any], row: int, one_hot: bool) -> list[int]:
    """The tokens one row commits, draft by draft."""
    seed, first, count = (int(batch[name][row]) for name in ("seed", "first_position", "draft_counts"))
    sampled, coupled = float(batch["temperature"][row]) > 0, bool(batch["is_coupled"][row])

    def draw(logits: Tensor, position: int, stream: Stream) -> int:
        noise = gumbel(torch.tensor(seed), torch.tensor(position), stream, VOCAB, logits.dtype)
        return int((logits + noise if sampled else logits).argmax())

    tokens: list[int] = []
    for step in range(count):
        logits, draft = batch["processed"][row, step], int(batch["drafts"][row, step])
        if not sampled or coupled:
            tokens.append(draw(logits, first + step, Stream.SAMPLE))
            if tokens[-1] != draft:
                return tokens
            continue
        p = logits.softmax(-1)
        q = torch.nn.functional.one_hot(torch.tensor(draft), VOCAB) if one_hot else batch["draft_probs"][row, step]
        if float(uniform(torch.tensor(seed), torch.tensor(first + step), Stream.ACCEPT)) * q[draft] >= p[draft]:
            return [*tokens, draw((p - q).clamp(min=0).log(), first + step, Stream.RESIDUAL)]
        tokens.append(draft)
    return [*tokens, draw(batch["processed"][row, count], first + count, Stream.SAMPLE)]


def committed(verified: Verified) -> list[list[int]]:
    assert torch.equal(verified.num_tokens, verified.num_accepted + 1)
    pairs = zip(verified.tokens.tolist(), verified.num_tokens.tolist(), strict=True)
    return [tokens[:count] for tokens, count in pairs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 1, 2, 5])
def test_equals_the_plain_reading(num_drafts: int, one_hot: bool, dtype: torch.dtype) -> None:
    batch: dict[str, Any] = make_batch(120, num_drafts, dtype)
    expected = [expected_row(batch, row, one_hot) for row in range(120)]
    if one_hot:
        batch["draft_probs"] = None
    assert committed(verify(**batch)) == expected
    past = torch.arange(num_drafts) >= batch["draft_counts"][:, None]
    for junk in (-1, 2**40):
        assert committed(verify(**{**batch, "drafts": batch["drafts"].masked_fill(past, junk)})) == expected


def test_a_row_is_the_same_alone_and_flags_only_save_work() -> None:
    batch = make_batch(40, 3)
    together = committed(verify(**batch))
    for row in range(40):
        alone = {name: values[row : row + 1] for name, values in batch.items()}
        sampled, coupled = bool(alone["temperature"] > 0), bool(alone["is_coupled"])
        verified = verify(**alone, any_coupled=sampled and coupled, any_rejection=sampled and not coupled)
        assert committed(verified) == [together[row]]


def test_without_drafts_both_methods_are_plain_sampling() -> None:
    batch: dict[str, Any] = make_batch(200, 0)
    plain = sample(batch["processed"], batch["seed"], batch["first_position"][:, None], batch["temperature"])
    for coupled in (True, False):
        batch["is_coupled"] = torch.full((200,), coupled)
        flags = {"any_coupled": coupled, "any_rejection": not coupled}
        assert torch.equal(verify(**batch, **flags).tokens, plain)
    greedy = batch["temperature"] == 0
    assert torch.equal(plain[greedy], batch["processed"].argmax(-1)[greedy])
    assert not torch.equal(plain, batch["processed"].argmax(-1))


def test_draft_sample_uses_the_noise_and_q_of_its_method() -> None:
    batch = make_batch(200, 0)
    logits, seed, position = batch["processed"][:, 0], batch["seed"], batch["first_position"]
    temperature, coupled = batch["temperature"], batch["is_coupled"]
    tokens, q = draft_sample(logits, seed, position, temperature, coupled)
    assert q is not None and torch.equal(q, logits.softmax(-1))
    for stream, rows in ((Stream.SAMPLE, coupled | (temperature == 0)), (Stream.DRAFT, ~coupled & (temperature > 0))):
        expected = sample(logits[:, None], seed, position[:, None], temperature, stream)[:, 0]
        assert torch.equal(tokens[rows], expected[rows])
    alone, none = draft_sample(logits, seed, position, temperature, coupled | True, any_rejection=False)
    assert none is None and torch.equal(alone[coupled], tokens[coupled])
    greedy, none = draft_sample(
        logits, seed, position, temperature * 0, coupled, any_coupled=False, any_rejection=False
    )
    assert none is None and torch.equal(greedy, logits.argmax(-1))


def test_rounding_never_leaves_the_targets_support() -> None:
    """q a hair above p everywhere: rejection is nearly impossible, its residual has no mass, and nothing is NaN."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    q = p * (1 + 2**-20)
    logits = residual_logits(p, q)
    assert torch.equal(logits, p.log())
    rows = 20_000
    seed = torch.arange(rows)
    verified = verify(
        p[:1].log().expand(rows, 2, -1), torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, dtype=torch.int64),
        torch.tensor([0.9, 0.0, 0.1, 0.0]).expand(rows, 1, -1), seed, seed, torch.ones(rows), seed < 0,
    )  # fmt: skip
    assert set(verified.tokens[:, 0].tolist()) == {0, 1}


def test_impossible_and_certain_drafts() -> None:
    logits = torch.tensor([0.0, float("-inf"), 1.0]).expand(500, 2, 3)
    seed = torch.arange(500)
    for draft, accepted in ((1, 0), (0, None)):
        drafts = torch.full((500, 1), draft)
        for q in (None, torch.nn.functional.one_hot(drafts, 3).float()):
            verified = verify(logits, drafts, torch.ones_like(seed), q, seed, seed, torch.ones(500), seed < 250)
            assert (verified.tokens.gather(1, verified.num_accepted[:, None]) != 1).all()
            if accepted is not None:
                assert (verified.num_accepted == accepted).all()
    certain = torch.tensor([float("-inf"), 5.0, float("-inf")]).expand(500, 2, 3)
    verified = verify(
        certain,
        torch.ones(500, 1, dtype=torch.int64),
        torch.ones_like(seed),
        None,
        seed,
        seed,
        torch.ones(500),
        seed < 0,
    )
    assert (verified.num_accepted == 1).all() and (verified.tokens == 1).all()


class CountingMode(TorchDispatchMode):
    """Counts the operators that do work: views cost no kernel."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_greedy_verification_is_a_handful_of_operators() -> None:
    batch = make_batch(12, 4)
    with CountingMode() as mode:
        verify(**batch, any_coupled=False, any_rejection=False)
    assert mode.count <= 8
