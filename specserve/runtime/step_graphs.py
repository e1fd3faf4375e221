"""All CUDA graphs of an engine: of the target's steps, and of the draft's passes where there is a draft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.runtime.capture import GraphSet, capture
from specserve.runtime.draft_graphs import DraftGraphs
from specserve.runtime.graphs import DecodeGraphs
from specserve.runtime.layout import StepLayout
from specserve.runtime.model_state import ModelState
from specserve.runtime.ragged_graphs import RaggedGraphs, token_buckets, verification_buckets
from specserve.runtime.rows import DeviceRows

MOST_VERIFIED = 8
"""Tokens of a row, its drafts and one more, that graphs of verifications take; a step with more of them takes another
way."""
_DRAFT_PREFILL = (64, 256, 1024)
_PASSES = (2, 1)  # tokens of a row: a round's first pass, and the others


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step may hold: rows and tokens; and how long a row's KV may be."""

    max_rows: int
    max_tokens: int
    max_context: int


class StepGraphs:
    """`drafts`: whether verifications are to be expected. Nothing is there before `capture`."""

    def __init__(
        self, target: ModelState, draft: ModelState | None, rows: DeviceRows, sizes: Sizes, *, drafts: bool
    ) -> None:
        bounds = {"max_rows": sizes.max_rows, "max_context": sizes.max_context}
        self.decode = DecodeGraphs(target, rows, **bounds)
        self.ragged: list[RaggedGraphs] = []  # the first that has room is the best
        self.passes: dict[int, DraftGraphs] = {}  # by tokens of a row
        self.draft_prefill: RaggedGraphs | None = None
        if target.takes_ragged:
            if drafts:
                few = verification_buckets(min(sizes.max_tokens, MOST_VERIFIED * sizes.max_rows))
                self.ragged.append(RaggedGraphs(target, rows, few, max_query_len=MOST_VERIFIED, **bounds))
            self.ragged.append(RaggedGraphs(target, rows, token_buckets(sizes.max_tokens), **bounds))
        if draft is not None and draft.takes_ragged:
            self.passes = {count: DraftGraphs(draft, rows, count=count, **bounds) for count in _PASSES}
            most = [size for size in _DRAFT_PREFILL if size < sizes.max_tokens] or [sizes.max_tokens]
            self.draft_prefill = RaggedGraphs(draft, rows, most, **bounds)

    def capture(self, device: torch.device, *, with_adapters: bool, progress: bool) -> dict[str, float]:
        """Capture them, those first whose memory the others can reuse. What it took."""
        draft: list[GraphSet] = [] if self.draft_prefill is None else [self.draft_prefill, *self.passes.values()]
        sets: list[GraphSet] = [*self.ragged[::-1], self.decode, *draft]
        return capture(sets, device, with_adapters=with_adapters, progress=progress)

    def largest(self) -> RaggedGraphs | None:
        """The one that takes most memory."""
        return self.ragged[-1] if self.ragged else None


def run_ragged(graphs: list[RaggedGraphs], layout: StepLayout) -> Tensor | None:
    """Hidden states [T, hidden] by the first that has room for the layout; None if none has."""
    query_lens = layout.query_lens
    assert query_lens is not None
    fitting = next((one for one in graphs if one.can_run(query_lens)), None)
    return None if fitting is None else fitting.run(layout)
