"""Sees what the draft model proposes, and with which probability, while an engine runs."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from specserve.engine.core.core import EngineCore
from specserve.speculation.proposer import DraftBatch, Drafts


class Round(NamedTuple):
    """One request's drafts of one step: `length` tokens were committed before tokens [k], of logprobs [k]."""

    request_id: str
    length: int
    tokens: Tensor
    logprobs: Tensor

    def up_to(self, end: int) -> Round:
        """Only the drafts at positions below `end`."""
        count = end - self.length
        return self._replace(tokens=self.tokens[:count], logprobs=self.logprobs[:count])


class DraftWatch:
    """While entered, notes what the draft model's proposer returns.

    Only requests sampled by rejection have probabilities to see, and only where a step calls the proposer.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._proposer: Any = core.built.proposers.get("draft_model")
        self._propose = self._proposer.propose
        self._seen: list[tuple[list[str], Tensor, Tensor, Tensor, Tensor]] = []

    def __enter__(self) -> DraftWatch:
        self._proposer.propose = self._listen
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._proposer.propose = self._propose

    def _listen(self, batch: DraftBatch) -> Drafts:
        lengths = batch.num_tokens.clone()
        holders = {request.row: request.request_id for request in self._core.scheduler.running}
        drafts: Drafts = self._propose(batch)
        probs = drafts.written_out()
        if probs is not None:
            chosen = probs.gather(-1, drafts.tokens.unsqueeze(-1)).squeeze(-1).log()
            ids = [holders.get(row, "") for row in batch.rows.tolist()]
            self._seen.append((ids, lengths, drafts.tokens.clone(), drafts.counts.clone(), chosen))
        return drafts

    def rounds(self) -> list[Round]:
        """All that was seen, in order."""
        return [
            Round(request_id, int(lengths[i]), tokens[i, :count].cpu(), chosen[i, :count].float().cpu())
            for ids, lengths, tokens, counts, chosen in self._seen
            for i, (request_id, count) in enumerate(zip(ids, counts.tolist(), strict=True))
            if count and request_id
        ]
