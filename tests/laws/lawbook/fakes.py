"""Proposers that are right always, never, or by chance: what they draft must not change a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lawbook.zoo import VOCAB
from specserve.speculation.proposer import DraftBatch, Drafts, Proposer
from specserve_kernels.sampling.tokens import draft_sample


@dataclass(frozen=True)
class FromScript:
    """Drafts what the script says plus `shift`: 0 makes an oracle, anything else is wrong at every position."""

    name: str
    script: Sequence[tuple[int, ...]]
    shift: int
    location: Literal["device", "host"]
    keeps_kv: bool = False

    def propose(self, batch: DraftBatch) -> Drafts:
        tokens = torch.zeros(len(batch.rows), batch.max_drafts, dtype=torch.int64)
        counts = torch.zeros(len(batch.rows), dtype=torch.int64)
        for i, (row, length) in enumerate(zip(batch.rows.tolist(), batch.num_tokens.tolist(), strict=True)):
            rest = self._rest(tuple(batch.history[row, :length].tolist()))[: batch.num_drafts[i]]
            counts[i] = len(rest)
            tokens[i, : len(rest)] = (torch.tensor(rest, dtype=torch.int64) + self.shift) % VOCAB
        return Drafts(tokens.to(batch.limits.device), counts.to(batch.limits.device))

    def _rest(self, known: tuple[int, ...]) -> tuple[int, ...]:
        """What follows in the script; nothing where the script has ended."""
        return next((text[len(known) :] for text in self.script if text[: len(known)] == known), ())


@dataclass
class Fickle:
    """To be combined with a draft model: by the number of committed tokens it finds nothing, drafts two tokens of the
    script, or drafts one that is wrong. `given` and `wrong`: drafts that rows got when it was right and wrong."""

    script: Sequence[tuple[int, ...]]
    name: str = "fickle"
    location: Literal["device", "host"] = "device"
    keeps_kv: bool = False
    given: int = 0
    wrong: int = 0

    def propose(self, batch: DraftBatch) -> Drafts:
        drafts = FromScript("", self.script, 0, "device").propose(batch)
        phase = batch.num_tokens % 3  # [B]
        counts = torch.minimum(drafts.counts, phase.new_tensor([0, 2, 1])[phase])
        for number, count, limit in zip(phase.tolist(), counts.tolist(), batch.num_drafts, strict=True):
            self.given += limit if count and number == 1 else 0
            self.wrong += limit if count and number == 2 else 0
        tokens = torch.where((phase == 2)[:, None], (drafts.tokens + 1) % VOCAB, drafts.tokens)
        return Drafts(tokens, counts)


@dataclass(frozen=True)
class ByChance:
    """Draws each draft from a wide distribution of its own, keeps a ragged number of them, and owns up to that q."""

    name: str = "random"
    location: Literal["device", "host"] = "device"
    keeps_kv: bool = False

    def propose(self, batch: DraftBatch) -> Drafts:
        tokens, probs = [], []
        sampling = batch.sampling
        vocab = sampling.vocab_size
        wide = torch.linspace(-1, 1, vocab, dtype=sampling.temperature.dtype, device=sampling.temperature.device)
        logits = wide.expand(len(batch.rows), vocab)  # [B, vocab]
        for step in range(batch.max_drafts):
            token, q = draft_sample(
                logits, sampling.seed, batch.num_tokens + step, sampling.temperature, sampling.is_coupled
            )
            tokens.append(token)
            probs.append(q)
        # How many are kept depends on the committed tokens alone, never on the drafts themselves.
        last = batch.history[batch.rows, batch.num_tokens - 1]  # [B]
        counts = torch.minimum(batch.limits, last % (batch.max_drafts + 1))
        return Drafts(torch.stack(tokens, 1), counts, _stacked(probs))


def _stacked(probs: list[Tensor | None]) -> Tensor | None:
    kept = [q for q in probs if q is not None]
    return torch.stack(kept, 1) if kept else None


def fakes(script: Sequence[tuple[int, ...]]) -> list[Proposer]:
    """`script`: full sequences, prompt and answer. The wrong one lives on the host, as a proposer may."""
    return [
        FromScript("oracle", script, 0, "device"),
        FromScript("wrong", script, 1, "host"),
        ByChance(),
    ]
