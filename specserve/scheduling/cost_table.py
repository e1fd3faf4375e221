"""CostTable: what a step takes, in milliseconds, as measured when the engine started.

A step of R decode rows that verifies T tokens in all, after K passes of a proposer over D of the rows, takes

    target(R, T) + first(D) + (K − 1) · further(D)

The target's part holds all that a step does besides drafting. A step without drafts (T = R) has a curve of its own: it
is replayed from a graph where others are not, and samples where they verify.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specserve.scheduling.curve import Curve

MAX_AUTO_DRAFTS = 7  # a row and step, where nobody asked for a number: graphs of verifications take 8 tokens of a row
# Rows times (1 + drafts) of a step whose drafts are the engine's choice: each position has logits and probabilities
# over the whole vocabulary, 0.5 MB in float32 for 128k tokens.
MAX_POSITIONS = 512


@dataclass(frozen=True, slots=True)
class DraftCosts:
    """One proposer's: its `first` pass and each `further` one by rows; `catch_up` of a draft model's KV by tokens."""

    first: Curve
    further: Curve
    catch_up: Curve

    def drafting(self, rows: int, passes: int) -> float:
        return self.first(rows) + (passes - 1) * self.further(rows) if rows and passes else 0.0


@dataclass(frozen=True, slots=True)
class CostTable:
    """`decode` by rows; `verify`: for some numbers of rows, ascending, the target's part by tokens; `drafting`:
    proposers that were measured. The others cost nothing as far as this table knows, and step times will tell."""

    decode: Curve
    verify: Sequence[tuple[int, Curve]] = ()
    drafting: Mapping[str, DraftCosts] = field(default_factory=dict)

    def target(self, rows: int, tokens: int) -> float:
        """Milliseconds of everything but drafting. Between measured numbers of rows the same tokens a row are
        compared."""
        if tokens <= rows:
            return self.decode(rows)
        assert self.verify, "nothing was measured with drafts"
        width = tokens / rows
        low_rows, low = self.verify[0]
        for high_rows, high in self.verify:
            if high_rows >= rows:
                break
            low_rows, low = high_rows, high
        else:  # more rows than were measured
            return low(low_rows * width) * rows / low_rows
        part = (rows - low_rows) / (high_rows - low_rows) if high_rows > low_rows else 0.0
        between = low(low_rows * width) * (1.0 - part) + high(high_rows * width) * part
        return max(between, self.decode(rows))

    def draft(self, proposer: str, rows: int, passes: int) -> float:
        costs = self.drafting.get(proposer)
        return costs.drafting(rows, passes) if costs is not None else 0.0

    def catch_up(self, proposer: str, tokens: int) -> float:
        """Milliseconds of the draft model's prefill over `tokens`."""
        costs = self.drafting.get(proposer)
        return costs.catch_up(tokens) if costs is not None and tokens else 0.0
