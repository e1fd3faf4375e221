"""Request: the scheduler's own record of one sequence. The ModelRunner never sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from specserve.core.messages import LoraRef, SpeculationStats
from specserve.core.sampling_params import SamplingParams
from specserve.scheduling.acceptance import Estimate
from specserve.scheduling.adapter_slots import SlotWeights
from specserve.scheduling.flows import Flow
from specserve_adapters.entry import AdapterUse


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. Lengths in tokens; `num_tokens` counts committed tokens (prompt + output).

    `num_in_flight` steps are submitted and not committed yet; together they emit between `num_in_flight_sampling`
    and `in_flight_bound` tokens, so every length that depends on them is an upper bound until then.
    """

    request_id: str
    prompt_len: int
    token_ids: list[int]  # prompt + output
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    max_total: int  # committed tokens at which it ends with "length"
    lora: tuple[LoraRef, ...] = ()
    adapter_uses: tuple[AdapterUse, ...] = ()
    cache_salt: str = ""
    proposer: str | None = None
    num_draft_tokens: int | None = 0  # a step; None: the scheduler's choice
    estimate: Estimate | None = None  # how likely its drafts are accepted; from its first row on

    status: Status = Status.WAITING
    flow: Flow | None = None
    slots: SlotWeights | None = None  # of its adapters, from when it takes them to its end
    row: int | None = None
    epoch: int = 0  # counts preemptions: a result of an earlier epoch brings tokens only
    block_ids: list[int] = field(default_factory=list)
    root: bytes | None = None
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # leading blocks whose full content is known and offered to the prefix cache
    cached_tokens: int = 0
    prefill_end: int = 0  # tokens known when it took its row
    num_computed_tokens: int = 0  # KV computed or scheduled while prefilling; exact
    num_draft_computed_tokens: int = 0  # committed
    num_draft_scheduled_tokens: int = 0  # with catch-up in flight
    num_in_flight: int = 0
    num_in_flight_sampling: int = 0
    in_flight_bound: int = 0
    queued_at: float = 0.0  # when it was added; seconds of the scheduler's clock
    queue_seconds: float | None = None  # from then to its first step, until an output has said so
    stats: SpeculationStats = field(default_factory=SpeculationStats)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def prefilling(self) -> bool:
        return self.num_computed_tokens < self.prefill_end

    @property
    def tokens_left(self) -> int:
        """Upper bound of tokens that it may still emit beyond those in flight."""
        return self.max_total - self.num_tokens - self.num_in_flight_sampling
