"""The seam between the runner and a proposer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from specserve.sampling.batch import SamplingBatch
from specserve_kernels.sampling.cut import DraftSoftmax

ForwardFn = Callable[[Tensor], Tensor]
"""Draft forward given by the runner: positions [B, Q] int64 of tokens in the rows' history → logits [B, vocab] of each
row's last position. It writes the draft's KV at those positions and applies the rows' draft companions."""


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Rows to draft for. `num_drafts[i]` ≥ 1 is how many drafts row i may get, and `limits` [B] int64 says the same on
    the device; K is their maximum.

    `history` [R, width] int64 and `lengths` [R] int64 are those of all device rows, `rows` [B] int64 picks this
    batch's, `num_tokens` = lengths[rows]. Columns from a row's length on are scratch: a drafted token is written there
    to be read back by the next pass. `request_ids[i]`: whose row i is.
    """

    rows: Tensor
    num_drafts: tuple[int, ...]
    limits: Tensor
    history: Tensor
    lengths: Tensor
    num_tokens: Tensor
    sampling: SamplingBatch
    forward: ForwardFn | None  # None: no draft model is loaded
    request_ids: tuple[str, ...] = ()

    @property
    def max_drafts(self) -> int:
        return max(self.num_drafts)


@dataclass(frozen=True, slots=True)
class Drafts:
    """`tokens` [B, K] int64; `counts` [B] int64 ≤ num_drafts: how many of a row's K are real.

    `probs` [B, K, vocab]: the exact processed distribution that each token was drawn from, written out or by the logits
    it follows from; or None if the proposer is sure of its tokens (one-hot).
    """

    tokens: Tensor
    counts: Tensor
    probs: Tensor | DraftSoftmax | None = None

    def written_out(self) -> Tensor | None:
        """`probs` as a tensor, for who mixes them with others'."""
        return self.probs.probs(self.tokens) if isinstance(self.probs, DraftSoftmax) else self.probs


class Proposer(Protocol):
    """`location` "host" makes the pipeline run at depth 1, for the proposer must see committed tokens.

    `keeps_kv`: it owns draft KV, which must be caught up before it can draft.
    """

    name: str
    location: Literal["device", "host"]
    keeps_kv: bool

    def propose(self, batch: DraftBatch) -> Drafts:
        """Draft up to `num_drafts[i]` tokens after each row's last committed token."""
        ...


@runtime_checkable
class Continuing(Proposer, Protocol):
    """A proposer that can go on from another's drafts. One that keeps KV must, to be combined with others: its KV is
    right only if its passes read what is then verified."""

    def continue_from(self, batch: DraftBatch, given: Drafts) -> Drafts:
        """Drafts that begin with the `given.counts` [B] that each row has already."""
        ...


@runtime_checkable
class Listener(Proposer, Protocol):
    """A proposer that is told, between steps, what its requests' texts are: on the host nobody reads the device.

    `key` stands for all that a text depends on besides its tokens (adapter versions and scales, cache salt): nothing of
    one key may be drafted for another.
    """

    def begin(self, request_id: str, key: bytes, token_ids: Sequence[int], num_seen: int) -> None:
        """A request's first committed token has come: `token_ids` are its prompt and that. The first `num_seen` tokens
        are known to have stood in an earlier text of the same key."""
        ...

    def extend(self, request_id: str, token_ids: Sequence[int]) -> None:
        """Further tokens were committed."""
        ...

    def end(self, request_id: str) -> None:
        """The request has ended; `begin` may never have come."""
        ...
