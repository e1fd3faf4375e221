"""What a server should have done before requests come: each way of choosing tokens, once, on made-up logits.

Sampling and verification are launched behind a step's graph, one kernel at a time, and which kernels these are depends
on what the rows of a step ask for. Whoever asked first would wait while his are compiled, a second for each feature.

Which ones there are depends on four things: whether rows are greedy, coupled or rejection rows; whether top_k or top_p
cuts; whether logits are the model's own or another processor rewrote them, in float32; and, in rejection rows, how the
drafts' distribution is told. Numbers of rows, positions and drafts do not matter, but for tiles of two sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.core.sampling_params import Method, SamplingParams
from specserve.runtime.drafting import merge_drafts
from specserve.runtime.rows import DeviceRows
from specserve.sampling.batch import SamplingBatch
from specserve.sampling.logprobs import logprobs
from specserve.sampling.processors import prepare
from specserve.sampling.rows import SamplingRows
from specserve.sampling.sample import sample
from specserve.speculation.draft_model import draw_draft
from specserve.speculation.proposer import Drafts
from specserve_kernels.sampling.best_token import rows_of_large_tiles
from specserve_kernels.sampling.drawn import Kept
from specserve_kernels.sampling.rejection import verify

_FEW = 2  # rows
_DRAFTS = 2
_LOOK_BACK = 64  # tokens of a history
_SPREAD = 100.0  # between the least and the largest logit: few tokens hold most of the mass, as a model's do
_METHODS: tuple[tuple[Method, Method], ...] = (
    ("rejection", "rejection"),
    ("coupled", "coupled"),
    ("rejection", "coupled"),
)


@dataclass(frozen=True, slots=True)
class Expected:
    """Of steps to come: the most positions that tokens are chosen for at once, one a row and one a draft; whether
    drafts are to be expected at all; the dtype of the model's logits, and of the draft's where there is one."""

    positions: int
    drafts: bool
    dtype: torch.dtype
    draft_dtype: torch.dtype | None = None


@torch.inference_mode()
def warm_up_sampling(rows: DeviceRows, vocab_size: int, expected: Expected) -> None:
    """Choose tokens in each way that requests may ask for.

    Parameters lie in rows of their own, noise has no state, and nothing is committed: of `rows` only lengths and
    histories are read, whatever they hold.
    """
    sizes = [_FEW]
    if expected.positions >= (large := rows_of_large_tiles(vocab_size)):
        sizes.append(large + large % _FEW)
    wide = torch.promote_types(expected.dtype, torch.float32)
    for methods, params in kinds():
        own = SamplingRows(_FEW, vocab_size, rows.num_tokens.device, wide)
        for row, method in enumerate(methods):
            own.set_row(row, params, seed=row, stop_ids=(0,), prompt_len=1, method=method)
        for size in sizes:
            batch = own.gather(tuple(range(_FEW)) * (size // _FEW))
            batch = batch.with_history(rows.num_tokens, rows.history, _LOOK_BACK)
            _choose(batch, rows.num_tokens[batch.device_rows], expected)


def kinds() -> Iterator[tuple[tuple[Method, Method], SamplingParams]]:
    """Batches of two rows, their methods and what both ask for, that between them need all that any mix of requests
    does."""
    rewriting: tuple[dict[str, object], ...] = ({}, {"logit_bias": {0: 1.0}})
    for source in rewriting:
        yield _METHODS[0], _params(temperature=0.0, **source)
        for methods in _METHODS:
            for cut in ({}, {"top_p": 0.9}, {"top_k": 20}):
                yield methods, _params(temperature=0.8, **cut, **source)
    yield _METHODS[0], _params(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, min_tokens=9, max_tokens=9, repetition_penalty=1.1,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={0: 1.0}, bad_words_token_ids=((1, 2), (3,)),
    )  # fmt: skip


def _params(**fields: object) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]


def _choose(batch: SamplingBatch, position: Tensor, expected: Expected) -> None:
    """One token of each row; then, if that may come, drafts of each verified, in whatever form these come."""
    num_rows = position.shape[0]
    values = torch.linspace(0.0, _SPREAD, batch.vocab_size, device=position.device)
    logits = values.to(expected.dtype).repeat(num_rows, 1 + _DRAFTS, 1)
    first = logits[:, :1].contiguous()
    logprobs(first, sample(first, batch, position), 2)
    if not expected.drafts:
        return
    draft_logits = None if expected.draft_dtype is None else values.to(expected.draft_dtype).repeat(num_rows, 1)
    for drafts in _drafts(batch, position, draft_logits):
        target = prepare(logits, batch, drafts.tokens)
        verify(
            target.logits, drafts.tokens, drafts.counts, drafts.probs, batch.seed, position, batch.temperature,
            batch.is_coupled, target.divisor, target.cut,
            any_coupled=batch.any_coupled, any_rejection=batch.any_rejection,
        )  # fmt: skip


def _drafts(batch: SamplingBatch, position: Tensor, logits: Tensor | None) -> Iterator[Drafts]:
    """Those of a proposer that is sure; those of a draft model, which gives `logits` [B, vocab], for all rows, and put
    among others'."""
    num_rows = position.shape[0]
    tokens = position.new_zeros(num_rows, _DRAFTS)
    counts = position.new_full((num_rows,), _DRAFTS)
    yield Drafts(tokens, counts)
    if logits is None:
        return
    kept: Kept | None = None
    for step in range(_DRAFTS):
        tokens[:, step], kept = draw_draft(logits, batch, tokens[:, :step], position + step, kept, _DRAFTS)
    if kept is None:  # as above
        return
    drafts = Drafts(tokens, counts, kept)
    yield drafts
    everyone = torch.arange(num_rows, device=position.device)
    yield merge_drafts([(everyone, drafts)], num_rows, batch.vocab_size)
