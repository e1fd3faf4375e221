"""Verification in Triton against its reference: the same acceptance and the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specserve_kernels.sampling.drafting import draw_with_softmax
from specserve_kernels.sampling.rejection import Verified, verify_ref, verify_triton

SMALL, TILED = 11, 2311


def make_batch(device: torch.device, num_rows: int, num_drafts: int, vocab: int) -> dict[str, Any]:
    """Rows of every kind: greedy, coupled and rejection, drafts from q or the likeliest, 0 to K of them."""
    generator = torch.Generator().manual_seed(num_rows * 100 + num_drafts)
    row = torch.arange(num_rows)
    processed = torch.randn(num_rows, num_drafts + 1, vocab, generator=generator) * 2
    processed[row % 5 == 1, :, 3:6] = float("-inf")
    q = (processed[:, :-1] + torch.randn(num_rows, num_drafts, vocab, generator=generator)).softmax(-1)
    drafts = q.argmax(-1)
    if num_drafts:
        drawn = q.reshape(-1, vocab).multinomial(1, generator=generator).view(num_rows, num_drafts)
        drafts = torch.where(row[:, None] % 2 == 0, drafts, drawn)
    counts = torch.randint(0, num_drafts + 1, (num_rows,), generator=generator)
    junk = torch.where(row % 2 == 0, -7, 2**40)[:, None]
    batch = {
        "processed": processed,
        "drafts": drafts.where(torch.arange(num_drafts) < counts[:, None], junk),
        "draft_counts": counts,
        "draft_probs": q,
        "seed": row * 31 - 40,
        "first_position": row * 13 % 50,
        "temperature": (row % 3 > 0).float() * 0.7,
        "is_coupled": row % 4 < 2,
    }
    return {name: values.to(device) for name, values in batch.items()}


def assert_same(got: Verified, expected: Verified) -> None:
    assert torch.equal(got.num_accepted, expected.num_accepted)
    assert torch.equal(got.num_tokens, expected.num_tokens)
    steps = torch.arange(got.tokens.shape[1], device=got.tokens.device)
    committed = steps < expected.num_tokens[:, None]
    assert torch.equal(got.tokens * committed, expected.tokens * committed)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize(("num_rows", "num_drafts", "vocab"), [(60, 1, SMALL), (60, 5, SMALL), (12, 2, TILED)])
def test_equals_the_reference(device: torch.device, num_rows: int, num_drafts: int, vocab: int, one_hot: bool) -> None:
    batch = make_batch(device, num_rows, num_drafts, vocab)
    if one_hot:
        batch["draft_probs"] = None
    assert_same(verify_triton(**batch), verify_ref(**batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_divisor_and_strided_logits(device: torch.device, dtype: torch.dtype) -> None:
    batch = make_batch(device, 40, 3, SMALL)
    wide = torch.zeros(4, 40, SMALL, device=device, dtype=dtype)
    wide.copy_(batch["processed"].transpose(0, 1))
    batch["processed"] = wide.transpose(0, 1)
    batch["divisor"] = batch["temperature"].where(batch["temperature"] > 0, 1.0)
    assert_same(verify_triton(**batch), verify_ref(**batch))


def test_without_drafts_both_methods_are_plain_sampling(device: torch.device) -> None:
    batch = make_batch(device, 40, 0, SMALL)
    for coupled in (True, False):
        flags = {"any_coupled": coupled, "any_rejection": not coupled}
        assert_same(verify_triton(**batch, **flags), verify_ref(**batch, **flags))


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)])
def test_flags_only_save_work(device: torch.device, flags: tuple[bool, bool]) -> None:
    any_coupled, any_rejection = flags
    batch = make_batch(device, 40, 3, SMALL)
    batch["is_coupled"] = torch.full((40,), any_coupled, device=device)
    if not (any_coupled or any_rejection):
        batch["temperature"] = torch.zeros(40, device=device)
    got = verify_triton(**batch, any_coupled=any_coupled, any_rejection=any_rejection)
    assert_same(got, verify_ref(**batch))


def test_a_rejection_by_rounding_takes_the_targets_own(device: torch.device) -> None:
    """q above p everywhere: the residual has no mass anywhere, and nothing is NaN."""
    batch = make_batch(device, 24, 1, SMALL)
    rows: dict[str, Tensor] = {"is_coupled": torch.zeros(24, dtype=torch.bool), "temperature": torch.ones(24)}
    batch |= {name: values.to(device) for name, values in rows.items()}
    batch["draft_counts"] = torch.ones_like(batch["draft_counts"])
    batch["drafts"] = batch["drafts"].clamp(0, 2)
    batch["draft_probs"] = batch["processed"][:, :1].softmax(-1) * 1000
    expected = verify_ref(**batch)
    assert (expected.num_accepted == 0).any()
    assert_same(verify_triton(**batch), expected)


def test_the_target_as_its_own_draft_is_always_accepted(device: torch.device) -> None:
    num_rows, num_drafts = 24, 2
    batch = make_batch(device, num_rows, num_drafts, TILED)
    coupled = torch.zeros(num_rows, dtype=torch.bool, device=device)
    temperature, stream = torch.ones(num_rows, device=device), torch.ones_like(batch["seed"])
    drawn = [
        draw_with_softmax(batch["processed"][:, j], batch["seed"], batch["first_position"] + j, temperature, stream)
        for j in range(num_drafts)
    ]
    batch |= {"is_coupled": coupled, "temperature": temperature}
    batch["drafts"] = torch.stack([tokens for tokens, _ in drawn], 1)
    batch["draft_probs"] = torch.stack([probs for _, probs in drawn], 1)
    batch["draft_counts"] = torch.full_like(batch["draft_counts"], num_drafts)
    assert (verify_triton(**batch).num_accepted == num_drafts).all()
