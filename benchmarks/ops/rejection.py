"""Verification of drafts: reads the target's logits of all positions, and one row of the draft's softmax a request."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.ops.case import Case, Setting, copies, count, differing
from specserve_kernels.sampling.rejection import verify, verify_ref

DRAFTS = 4
Method = Literal["coupled", "rejection", "rejection, one-hot"]


def cases(setting: Setting) -> Iterator[Case]:
    for rows in setting.rows:
        yield case(setting, rows, "coupled")
        yield case(setting, rows, "rejection")
        yield case(setting, rows, "rejection, one-hot")


def case(setting: Setting, rows: int, method: Method) -> Case:
    vocab, device = setting.shape.vocab, setting.device
    size = 4 * rows * vocab * (DRAFTS + 1 + (method == "rejection"))
    seed, coupled = torch.arange(rows, device=device), torch.full((rows,), method == "coupled", device=device)
    counts, temperature = torch.full_like(seed, DRAFTS), torch.full((rows,), 0.8, device=device)

    def buffers() -> tuple[Tensor | None, ...]:
        logits = setting.randn(rows, DRAFTS + 1, vocab, scale=2.0, dtype=torch.float32)
        noise = setting.randn(rows, DRAFTS, vocab, scale=0.7, dtype=torch.float32)
        q = noise.add_(logits[:, :-1]).softmax(-1)
        drafts = q.flatten(0, 1).multinomial(1).view(rows, DRAFTS)
        probs = q if method == "rejection" else None
        return logits, drafts, counts, probs, seed, seed, temperature, coupled

    sets = copies(buffers, size)
    wanted = {"any_coupled": method == "coupled", "any_rejection": method != "coupled"}

    def error() -> float:
        """The share of committed tokens that differ, or of requests whose counts do."""
        mine, want = verify(*sets[0], **wanted), verify_ref(*sets[0], **wanted)  # type: ignore[arg-type]
        junk = torch.arange(DRAFTS + 1, device=device) >= want.num_tokens[:, None]
        tokens = differing(mine.tokens.masked_fill(junk, 0), want.tokens.masked_fill(junk, 0))
        return max(tokens, differing(mine.num_tokens, want.num_tokens))

    calls = [partial(verify, *one, **wanted) for one in sets]  # type: ignore[arg-type]
    return Case(f"{method}, {count(rows, 'row')}", calls, size, error)
