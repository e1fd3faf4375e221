"""Speculation between two Markov chains, straight on the kernels: no engine, no model, as many samples as one likes.

Target and draft are two chains over 8 tokens. Every sample is a row with its own seed and generates a few tokens, in as
many rounds of drafting and verification as it takes; they are held against the target's own probabilities by χ².
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from specserve.core.sampling_params import SamplingParams
from specserve.sampling.processors import process
from specserve.sampling.rows import SamplingRows
from specserve_kernels.sampling.rejection import Verified, verify
from specserve_kernels.sampling.tokens import draft_sample

VOCAB = 8
SAMPLES = 100_000
MANY = 1_000_000
LENGTH = 3
START = 2  # the known token before the first
POSITION = 1000  # of the first token
P_VALUE = 1e-4

PARAMS = {
    "plain": SamplingParams(),
    "top_p": SamplingParams(temperature=1.3, top_p=0.75),
    "top_k_min_p": SamplingParams(temperature=0.6, top_k=5, min_p=0.02),
}


@dataclass(frozen=True)
class Setting:
    """Two chains as processed logits [V, V] of the next token given the last, and how to speculate."""

    target: Tensor
    draft: Tensor
    num_drafts: int
    is_coupled: bool
    one_hot: bool = False  # the draft's favourite token instead of a draw
    ragged: bool = False
    claimed_q: Tensor | None = None  # [V, V], told to verification instead of the truth
    verify: Callable[..., Verified] = verify


def chains(
    params: SamplingParams, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Processed logits of target and draft."""
    generator = torch.Generator().manual_seed(4)
    target = torch.randn(VOCAB, VOCAB, generator=generator, dtype=dtype) * 1.2
    draft = target + torch.randn(VOCAB, VOCAB, generator=generator, dtype=dtype)
    rows = SamplingRows(1, VOCAB, "cpu", dtype)
    rows.set_row(0, params, seed=0, stop_ids=(), prompt_len=1)
    batch, no_drafts = rows.gather([0] * VOCAB), torch.zeros(VOCAB, 0, dtype=torch.int64)
    processed = [process(logits[:, None], batch, no_drafts)[:, 0] for logits in (target, draft)]
    return processed[0].to(device), processed[1].to(device)


def speculate(setting: Setting, last: Tensor, seed: Tensor, position: Tensor) -> Verified:
    """One round of every row: `last` is its last known token, `position` that of the next."""
    num_rows, device = len(last), last.device
    temperature = torch.ones(num_rows, device=device)
    is_coupled = torch.full((num_rows,), setting.is_coupled, device=device)
    context, probs = [last], []
    for step in range(setting.num_drafts):
        logits = setting.draft[context[-1]]
        if setting.one_hot:
            token = logits.argmax(-1)
        else:
            token, q = draft_sample(logits, seed, position + step, temperature, is_coupled)
            assert q is not None
            probs.append(q if setting.claimed_q is None else setting.claimed_q[context[-1]])
        context.append(token)
    processed = setting.target[torch.stack(context, 1)]  # [B, K+1, V]
    drafts = torch.stack(context, 1)[:, 1:]
    counts = torch.full((num_rows,), setting.num_drafts, device=device)
    if setting.ragged:
        counts = (seed * 7919 + position) % (setting.num_drafts + 1)
        junk = torch.where(seed % 2 == 0, -7, VOCAB + 99)[:, None]
        drafts = drafts.where(torch.arange(setting.num_drafts, device=device) < counts[:, None], junk)
    draft_probs = torch.stack(probs, 1) if probs else None
    flags = {"any_coupled": setting.is_coupled, "any_rejection": not setting.is_coupled}
    return setting.verify(processed, drafts, counts, draft_probs, seed, position, temperature, is_coupled, **flags)


def generate(setting: Setting, num_rows: int = SAMPLES, length: int = LENGTH, first_seed: int = 0) -> Tensor:
    """The first `length` tokens of every row. [B, length]"""
    device = setting.target.device
    seed = torch.arange(first_seed, first_seed + num_rows, device=device)
    tokens = torch.zeros(num_rows, length + setting.num_drafts + 1, dtype=torch.int64, device=device)
    done = torch.zeros_like(seed)
    last = torch.full_like(seed, START)
    while int(done.min()) < length:
        rows = torch.nonzero(done < length).squeeze(1)
        verified = speculate(setting, last[rows], seed[rows], POSITION + done[rows])
        index = done[rows, None] + torch.arange(setting.num_drafts + 1, device=device)
        tokens[rows[:, None], index] = verified.tokens  # what is not committed is overwritten by the next round
        last[rows] = verified.tokens.gather(1, verified.num_accepted[:, None]).squeeze(1)
        done[rows] += verified.num_tokens
    return tokens[:, :length]


def p_values(setting: Setting, tokens: Tensor) -> list[float]:
    """χ² of the first 1, 2, … tokens [B, length] jointly against the target chain's own probabilities."""
    tokens = tokens.cpu()
    transition = setting.target.double().softmax(-1).cpu().numpy()
    expected, code, result = np.ones(1), np.zeros(len(tokens), dtype=np.int64), []
    for column in range(tokens.shape[1]):
        last = np.arange(len(expected)) % VOCAB if column else np.array([START])
        expected = (expected[:, None] * transition[last]).ravel()
        code = code * VOCAB + tokens[:, column].numpy()
        observed = np.bincount(code, minlength=len(expected))
        result.append(chi_square(observed, expected * len(tokens)))
    return result


def p_values_of_many(setting: Setting, samples: int) -> list[float]:
    """Of rows that are too many for memory at once."""
    parts = [generate(setting, SAMPLES, first_seed=first) for first in range(0, samples, SAMPLES)]
    return p_values(setting, torch.cat(parts))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The p-value; cells that expect under 5 are one cell, and what is impossible must not happen."""
    assert observed[expected == 0].sum() == 0, "an impossible token was sampled"
    small = (expected < 5) & (expected > 0)
    large = expected >= 5
    observed = np.append(observed[large], observed[small].sum())
    expected = np.append(expected[large], expected[small].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep] * (observed.sum() / expected.sum())).pvalue)
