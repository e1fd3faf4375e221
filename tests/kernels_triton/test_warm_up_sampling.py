"""After the warm-up no mix of requests needs a kernel that was not launched, and rows are as they were.

Which kernel a launch takes is read off its arguments, by Triton's own rules: so it is known where nothing is compiled.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from specserve.core.sampling_params import SamplingParams
from specserve.runtime import warm_up_sampling as module
from specserve.runtime.drafting import merge_drafts
from specserve.runtime.rows import DeviceRows
from specserve.runtime.warm_up_sampling import Expected, warm_up_sampling
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.processors import prepare
from specserve.sampling.sample import sample
from specserve.speculation.draft_model import draw_draft
from specserve.speculation.proposer import Drafts
from specserve_kernels import dispatch
from specserve_kernels.sampling import best_token
from specserve_kernels.sampling.rejection import verify

VOCAB = 4104  # two large tiles; a multiple of 8 alone, so that many a distance is none of 16
MAX_ROWS, MAX_DRAFTS = 9, 4
MIXES = 1000
Variant = tuple[Any, ...]


def variant(
    names: list[str], settings: dict[str, Any], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> Variant:
    """What Triton compiles a launch's kernel for."""
    any_number = set(settings["do_not_specialize"] or ())
    any_place = set(settings["do_not_specialize_on_alignment"] or ())
    key: list[Any] = sorted(constants.items())
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, Tensor):
            key.append((name, value.dtype, name in any_place or value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and name in any_number:
            key.append((name, abs(value) < 2**31))
        elif isinstance(value, int):
            key.append((name, value == 1, value % 16 == 0 or name in any_place, abs(value) < 2**31))
        else:
            assert value is None, name
            key.append((name, None))
    return tuple(key)


@pytest.fixture
def interpreted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes what lies on a CPU."""
    if device.type != "cpu":
        pytest.skip("of interpreted kernels; tests/gpu says the same of compiled ones")
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", frozenset({"cpu"}))


@pytest.fixture
def launched(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> set[Variant]:
    """The kernels launched so far, of which none is run: each token is 0."""
    seen: set[Variant] = set()

    def noting(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        of_launch = variant(kernel.arg_names, kernel.kwargs, arguments, constants)
        seen.add((kernel.__name__, kernel.fn.__module__, *of_launch))
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            if name == "tokens":
                value.zero_()

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noting)
    monkeypatch.setattr(best_token, "ENOUGH_PROGRAMS", 16)  # 8 rows have large tiles
    return seen


@pytest.fixture
def rows() -> DeviceRows:
    """Of requests of every kind, some with neighbours of the same."""
    return DeviceRows(
        MAX_ROWS, 40, slack=8, block_size=8, vocab_size=VOCAB, max_adapters=1, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def expected(dtype: torch.dtype, *, draft_model: bool = True) -> Expected:
    return Expected(MAX_ROWS * (1 + MAX_DRAFTS), True, dtype, dtype if draft_model else None)


def contents(rows: DeviceRows) -> list[Any]:
    device = [rows._words.clone(), rows.adapter_weights.clone(), torch.from_numpy(rows.sampling._packed.copy())]
    return [*device, list(rows.sampling._host), list(rows.adapters), list(rows.num_logprobs), list(rows._num_blocks)]


def enter(rows: DeviceRows, row: int, params: SamplingParams) -> None:
    rows.history[row] = torch.arange(rows.history.shape[1]) * (row + 3) % 50
    rows.num_tokens[row] = 12 + row
    rows.sampling.set_row(row, params, seed=row, stop_ids=(2,), prompt_len=7)


def any_params(draw: random.Random) -> SamplingParams:
    """A request with a few features, as often with none."""
    features: list[dict[str, Any]] = [
        {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"frequency_penalty": 0.5}, {"logit_bias": {7: 2.0}},
        {"bad_words_token_ids": tuple((8, 9, 3)[: 1 + i % 3] for i in range(draw.randrange(1, 4)))}, {"min_tokens": 30},
    ]  # fmt: skip
    chosen = draw.sample(features, draw.choice((0, 0, 0, 1, 1, 2)))
    seed = draw.choice((None, None, 5))
    return SamplingParams(
        temperature=draw.choice((0.0, 0.7, 0.7, 1.0)), seed=seed, **{k: v for one in chosen for k, v in one.items()}
    )


def step(rows: DeviceRows, mix: tuple[int, ...], draw: random.Random, dtype: torch.dtype) -> None:
    """What a step does behind its forward, with drafts of none, some or all of the rows, in any form they have."""

    def logits(positions: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(size)
        return (torch.randn(size, positions, VOCAB, generator=generator) * 4).to(dtype)

    def gathered(some: tuple[int, ...]) -> SamplingBatch:
        return rows.sampling.gather(some).with_history(rows.num_tokens, rows.history)

    index = torch.tensor(mix)
    batch, position = gathered(mix), rows.num_tokens[index]
    num_drafts = draw.randrange(MAX_DRAFTS + 1)
    if not num_drafts:
        sample(logits(1, len(mix)), batch, position)
        return
    form = draw.choice(("sure", "all", "some"))
    if form == "sure":
        tokens = torch.zeros(len(mix), num_drafts, dtype=torch.int64)
        drafts = Drafts(tokens, torch.full((len(mix),), num_drafts))
    else:
        some = mix if form == "all" else mix[: draw.randrange(1, len(mix) + 1)]
        tokens, kept, own = torch.zeros(len(some), num_drafts, dtype=torch.int64), None, gathered(some)
        for i in range(num_drafts):
            passed = logits(1, len(some))[:, 0]
            tokens[:, i], kept = draw_draft(passed, own, tokens[:, :i], position[: len(some)] + i, kept, num_drafts)
        drafts = Drafts(tokens, torch.full((len(some),), num_drafts), kept)
        if form == "some":
            drafts = merge_drafts([(torch.arange(len(some)), drafts)], len(mix), VOCAB)
    target = prepare(logits(num_drafts + 1, len(mix)), batch, drafts.tokens)
    verify(
        target.logits, drafts.tokens, drafts.counts, drafts.probs, batch.seed, position, batch.temperature,
        batch.is_coupled, target.divisor, target.cut,
        any_coupled=batch.any_coupled, any_rejection=batch.any_rejection,
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.bfloat16, 73), (torch.float32, 69)])
def test_no_mix_of_requests_needs_another_kernel(
    launched: set[Variant], rows: DeviceRows, dtype: torch.dtype, kernels: int
) -> None:
    warm_up_sampling(rows, VOCAB, expected(dtype))
    warm, draw = set(launched), random.Random(3)
    assert len(warm) == kernels, "each takes part of a second to compile, and the start waits"
    for _ in range(MIXES):
        mix = tuple(draw.sample(range(MAX_ROWS), draw.choice((1, 2, 3, MAX_ROWS))))
        alike = any_params(draw)
        for row in mix:
            enter(rows, row, alike if draw.random() < 0.7 else any_params(draw))
        step(rows, mix, draw, dtype)
        assert not launched - warm


@pytest.mark.usefixtures("interpreted")
def test_rows_are_as_they_were(rows: DeviceRows, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, vocab = random.Random(0), 60
    for row in range(MAX_ROWS):
        enter(rows, row, any_params(draw))
    before = contents(rows)
    verified: list[Tensor] = []

    def noting(*arguments: Any, **flags: Any) -> None:
        verified.append(verify(*arguments, **flags).tokens[:, 0])

    plain, *_, everything = list(module.kinds())[1:]
    monkeypatch.setattr(module, "kinds", lambda: [plain, everything])  # others differ in what is read alone
    monkeypatch.setattr(module, "verify", noting)
    warm_up_sampling(rows, vocab, expected(torch.bfloat16))
    assert len(verified) == 6 and all(((tokens >= 0) & (tokens < vocab)).all() for tokens in verified)
    for mine, wanted in zip(contents(rows), before, strict=True):
        assert torch.equal(mine, wanted) if isinstance(mine, Tensor) else mine == wanted


def test_what_cannot_come_is_left_out(launched: set[Variant], rows: DeviceRows) -> None:
    warm_up_sampling(rows, VOCAB, Expected(MAX_ROWS, False, torch.bfloat16))
    assert not any("verification" in module or "drafting" in module for _, module, *_ in launched)
    plain = len(launched)
    warm_up_sampling(rows, VOCAB, expected(torch.bfloat16, draft_model=False))
    assert plain < len(launched) and not any("drafting" in module for _, module, *_ in launched)
