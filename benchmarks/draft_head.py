"""Gives a live engine's draft another share α of agreement with its target: one pair serves every acceptance.

Of a pair (benchmarks/pair.py) only the draft's output head depends on α. It is computed anew from the draft's
embedding, lm_head[successor[v]] = 20/hidden · embed[v], and written where the engine keeps it, quantised as it is
there; graphs read the same memory. What the engine has learnt about acceptance stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch

from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.pair import HEAD_GAIN, permutations
from benchmarks.shapes import PairSettings
from specserve.models.decoder import Decoder

ROWS_AT_ONCE = 16384  # what is computed lies beside the old head: 64 MB of a 1B's, and as float32 to be quantised


class DraftHead:
    """The output head of an engine's draft model, which is that of a pair with these settings, for some values of α."""

    def __init__(self, engine: SpecserveEngine, settings: PairSettings, alphas: Iterable[float]) -> None:
        draft = engine.core.built.runner.draft
        assert draft is not None, "the engine has no draft model"
        parameters = cast(Decoder, draft.model).parameters
        self._head = parameters["lm_head.weight"]
        self._embed = parameters["model.embed_tokens.weight"].destination  # [vocab, hidden]
        self._sources = {}  # by α, each token's predecessor [vocab]
        for alpha in alphas:
            _, successor = permutations(len(self._embed), alpha, settings.seed)
            self._sources[alpha] = torch.argsort(successor).to(self._embed.device)

    def exchange(self, alpha: float) -> None:
        """From now on drafts are accepted with probability `alpha`. Steps on their way still see the old head."""
        sources, gain = self._sources[alpha], HEAD_GAIN / self._embed.shape[1]
        for first in range(0, len(sources), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(sources))
            self._head.rows(first, last).load(self._embed[sources[first:last]] * gain)
