"""top_k and top_p as numbers beside raw logits: what masking gives, in sampling, drafting and verification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from specserve_kernels.sampling import drawn, selection, tokens
from specserve_kernels.sampling.cut import Cut, DraftSoftmax, cut_logits
from specserve_kernels.sampling.drafting import draw_kept, new_softmax
from specserve_kernels.sampling.random import Stream
from specserve_kernels.sampling.rejection import Verified, verify_ref, verify_triton
from specserve_kernels.sampling.threshold import find_cut

# top_k, top_p, divisor and method of a row: both, each alone, neither; greedy rows have neither
SETTINGS = [(9, 0.7, 0.8, 0), (0, 0.9, 0.7, 0), (4, 1.0, 1.3, 1), (0, 1.0, 0.6, 0), (0, 0.5, 1.0, 1), (0, 1.0, 1.0, 0)]
GREEDY = 5
VOCAB = 2311
Flags = tuple[int, bool, bool]


def settings(device: torch.device, rows: int) -> dict[str, Tensor]:
    table = [SETTINGS[row % len(SETTINGS)] for row in range(rows)]
    is_greedy = torch.arange(rows, device=device) % len(SETTINGS) == GREEDY
    divisor = torch.tensor([one[2] for one in table], device=device)
    return {
        "top_k": torch.tensor([one[0] or VOCAB for one in table], device=device),
        "top_p": torch.tensor([one[1] if one[1] < 1 else math.inf for one in table], device=device),
        "divisor": divisor,
        "temperature": divisor.masked_fill(is_greedy, 0.0),
        "is_coupled": torch.tensor([one[3] > 0 for one in table], device=device),
        "seed": torch.arange(rows, device=device) * 31 - 40,
        "first_position": torch.arange(rows, device=device) * 13 % 50,
    }


FLAGS: Flags = (9, True, True)


def make_logits(device: torch.device, dtype: torch.dtype, rows: int, positions: int, seed: int = 0) -> Tensor:
    """As a model's: most of the mass on few tokens; bfloat16 makes ties of them."""
    generator = torch.Generator().manual_seed(rows * 100 + positions + seed)
    logits = torch.randn(rows, positions, VOCAB, generator=generator) * 2
    logits[..., ::97] += 5
    return logits.to(device, dtype)


def cut_of(logits: Tensor, rows: dict[str, Tensor], divisor: Tensor | None) -> Cut:
    return find_cut(logits, divisor, rows["top_k"], rows["top_p"], *FLAGS)


def softmax(processed: Tensor) -> Tensor:
    return processed.double().softmax(-1).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divided", [True, False])
def test_numbers_say_what_masking_does(device: torch.device, dtype: torch.dtype, divided: bool) -> None:
    rows = settings(device, 6)
    logits = make_logits(device, dtype, 6, 2).transpose(0, 1).contiguous().transpose(0, 1)
    divisor = rows["divisor"] if divided else None
    source = selection.truncate_triton(logits, divisor, rows["top_k"], rows["top_p"], *FLAGS)
    want = selection.truncate_ref(logits, divisor, rows["top_k"], rows["top_p"], *FLAGS).processed()
    assert torch.equal(source.processed(), want)
    assert (want.isfinite().sum(-1) < VOCAB)[:3].all(), "something is cut"
    assert source.cut is not None
    kept = DraftSoftmax(logits, divisor, source.cut)
    probs = kept.probs(torch.zeros(6, 2, dtype=torch.int64, device=device))
    torch.testing.assert_close(probs, softmax(want), rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("capacity", [512, 4096])
def test_a_short_list_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """The search then reads the row itself: raw, and divided there."""
    monkeypatch.setattr("specserve_kernels.sampling.threshold.CAPACITY", capacity)
    rows = settings(device, 6)
    logits = (torch.randn(6, 1, VOCAB, generator=torch.Generator().manual_seed(5)) * 0.01).to(device, torch.bfloat16)
    cut = cut_of(logits, rows, rows["divisor"])
    want = selection.truncate_ref(
        logits.double(), rows["divisor"].double(), rows["top_k"], rows["top_p"].double(), *FLAGS
    )
    assert torch.equal(cut_logits(logits, rows["divisor"], cut).isfinite(), want.processed().isfinite())


def test_the_targets_own_token(device: torch.device) -> None:
    rows = settings(device, 12)
    logits = make_logits(device, torch.bfloat16, 12, 2)
    cut = cut_of(logits, rows, rows["divisor"])
    arguments = (logits, rows["divisor"], rows["seed"], rows["first_position"], rows["temperature"], cut)
    got = tokens.sample_tokens_triton(*arguments)
    assert torch.equal(got, tokens.sample_tokens_ref(*arguments))
    masked = cut_logits(logits, rows["divisor"], cut)
    assert masked.gather(-1, got[..., None]).isfinite().all()


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_draft_is_drawn_from_what_is_kept(device: torch.device, is_cut: bool) -> None:
    rows = settings(device, 12)
    logits = make_logits(device, torch.bfloat16, 12, 1)
    cut = cut_of(logits, rows, rows["divisor"]) if is_cut else None
    q = new_softmax(logits[:, 0], rows["divisor"], 3)
    q.cut.total.fill_(1.0), q.cut.largest.fill_(0.0), q.cut.threshold.fill_(0.0), q.cut.last_id.fill_(0)
    q.logits.zero_()
    stream = torch.where(rows["is_coupled"], Stream.SAMPLE, Stream.DRAFT)
    drawn_tokens = draw_kept(
        logits[:, 0], cut, rows["seed"], rows["first_position"], rows["temperature"], rows["is_coupled"], q, 1
    )
    processed = selection.Truncated(logits, rows["divisor"], cut).processed()[:, 0]
    want = tokens.gumbel_argmax_ref(processed, rows["seed"], rows["first_position"], rows["temperature"], stream)
    assert torch.equal(drawn_tokens, want)
    assert torch.equal(q.logits[:, 1], logits[:, 0]) and not q.logits[:, ::2].any(), "only its own step"
    probs = q.probs(torch.zeros(12, 3, dtype=torch.int64, device=device))[:, 1]
    torch.testing.assert_close(probs, softmax(processed), rtol=5e-6, atol=1e-9)


def assert_same(got: Verified, expected: Verified) -> None:
    assert torch.equal(got.num_accepted, expected.num_accepted)
    steps = torch.arange(got.tokens.shape[1], device=got.tokens.device)
    committed = steps < expected.num_tokens[:, None]
    assert torch.equal(got.tokens * committed, expected.tokens * committed)


def draw_all(
    logits: Tensor, rows: dict[str, Tensor], num_drafts: int, divisor: Tensor | None, is_cut: bool
) -> tuple[Tensor, DraftSoftmax]:
    """Drafts [B, K] of logits [B, K, vocab], step after step as a proposer draws them."""
    kept: Any = None
    drafts = []
    for step in range(num_drafts):
        one = logits[:, step : step + 1]
        source = selection.Truncated(one, divisor, cut_of(one, rows, divisor) if is_cut else None)
        if kept is None:
            kept = new_softmax(one[:, 0], divisor, num_drafts)
        position = rows["first_position"] + step
        drafts.append(
            drawn.draw_draft_token(
                source, rows["seed"], position, rows["temperature"], rows["is_coupled"], kept, step,
                any_coupled=True, any_rejection=True,
            )
        )  # fmt: skip
    return torch.stack(drafts, 1), kept


@pytest.mark.parametrize(("dtype", "is_cut", "divided"), [
    (torch.bfloat16, True, True), (torch.float32, True, False), (torch.bfloat16, False, True),
])  # fmt: skip
def test_verification_equals_the_reference(
    device: torch.device, dtype: torch.dtype, is_cut: bool, divided: bool
) -> None:
    num_rows, num_drafts = 18, 2
    rows = settings(device, num_rows)
    divisor = rows["divisor"] if divided else None
    logits = make_logits(device, dtype, num_rows, num_drafts + 1)
    near = (logits[:, :-1].float() + make_logits(device, torch.float32, num_rows, num_drafts, 7) * 0.3).to(dtype)
    drafts, kept = draw_all(near, rows, num_drafts, divisor, is_cut)
    kept.cut.total[::7, 0] = 0.0  # its proposer was sure of these
    counts = torch.arange(num_rows, device=device) % (num_drafts + 1)
    cut = cut_of(logits, rows, divisor) if is_cut else None
    arguments = (
        logits, drafts, counts, kept, rows["seed"], rows["first_position"], rows["temperature"], rows["is_coupled"],
        divisor, cut,
    )  # fmt: skip
    expected = verify_ref(*arguments)
    assert_same(verify_triton(*arguments), expected)
    ends = expected.num_accepted[~rows["is_coupled"]] < counts[~rows["is_coupled"]]
    assert ends.any() and not ends.all(), "rejections and rows accepted whole"


@pytest.mark.parametrize("is_cut", [True, False])
def test_the_target_as_its_own_draft_is_always_accepted(device: torch.device, is_cut: bool) -> None:
    """q is bitwise p, though one was worked out position by position and the other for all at once."""
    num_rows, num_drafts = 12, 2
    rows = settings(device, num_rows)
    rows["is_coupled"] = torch.zeros(num_rows, dtype=torch.bool, device=device)
    logits = make_logits(device, torch.bfloat16, num_rows, num_drafts + 1)
    drafts, kept = draw_all(logits, rows, num_drafts, rows["divisor"], is_cut)
    cut = cut_of(logits, rows, rows["divisor"]) if is_cut else None
    if cut is not None:
        assert all(torch.equal(mine, whole[:, :-1]) for mine, whole in zip(kept.cut, cut, strict=True))
    got = verify_triton(
        logits, drafts, torch.full_like(rows["seed"], num_drafts), kept, rows["seed"], rows["first_position"],
        rows["temperature"], rows["is_coupled"], rows["divisor"], cut,
    )  # fmt: skip
    assert (got.num_accepted == num_drafts).all()


@pytest.mark.parametrize("is_coupled", [True, False], ids=["coupled", "rejection"])
def test_samples_follow_the_target(device: torch.device, is_coupled: bool) -> None:
    """χ² of the first committed token, drafted by another distribution: draft and target cut, drawn and verified."""
    if device.type != "cuda":
        pytest.skip("the interpreter takes seconds a row")
    num_rows, vocab = 100_000, 8
    generator = torch.Generator().manual_seed(11)
    one = (torch.randn(1, 2, vocab, generator=generator) * 1.5).to(device, torch.bfloat16)
    other = (one[:, :1].float() + torch.randn(1, 1, vocab, generator=generator).to(device)).to(torch.bfloat16)
    seed = torch.arange(num_rows, device=device) * 7919
    rows = {
        "top_k": torch.full_like(seed, vocab),
        "top_p": torch.full((num_rows,), 0.85, device=device),
        "divisor": torch.full((num_rows,), 0.8, device=device),
        "temperature": torch.full((num_rows,), 0.8, device=device),
        "is_coupled": torch.full((num_rows,), is_coupled, device=device),
        "seed": seed,
        "first_position": torch.full_like(seed, 5),
    }
    drafts, kept = draw_all(other.expand(num_rows, 1, vocab).contiguous(), rows, 1, rows["divisor"], True)
    logits = one.expand(num_rows, 2, vocab).contiguous()
    cut = cut_of(logits, rows, rows["divisor"])
    verified = verify_triton(
        logits, drafts, torch.ones_like(seed), kept, seed, rows["first_position"], rows["temperature"],
        rows["is_coupled"], rows["divisor"], cut, any_coupled=is_coupled, any_rejection=not is_coupled,
    )  # fmt: skip
    p = softmax(cut_logits(logits[:1], rows["divisor"][:1], Cut(*(numbers[:1] for numbers in cut))))[0, 0]
    found = torch.bincount(verified.tokens[:, 0], minlength=vocab).double().cpu()
    possible = (p > 0).cpu()
    assert 1 < possible.sum() < vocab and found[~possible].sum() == 0
    assert 0 < verified.num_accepted.sum() < num_rows
    want = p.double().cpu()[possible]
    assert chisquare(found[possible], want / want.sum() * num_rows).pvalue > 1e-4
