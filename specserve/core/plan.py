"""StepPlan goes down to the ModelRunner, StepResult comes up; nothing else passes between scheduling and runtime."""

from __future__ import annotations

import msgspec

from specserve.core.messages import TokenLogprobs
from specserve.core.sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, kw_only=True):
    """A request takes a device row: everything that stays the same while it holds it."""

    row: int
    token_ids: list[int]  # prompt + output so far
    prompt_len: int
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]  # tokens that min_tokens forbids: EOS and stop_token_ids
    adapters: tuple[tuple[int, float], ...] = ()  # (device slot, weight), at most max_adapters_per_request
    num_computed: int = 0  # target KV that the prefix cache already holds
    num_draft_computed: int = 0


class BlockAppend(msgspec.Struct, frozen=True):
    """Blocks appended to a row's block table, from index `start`."""

    row: int
    start: int
    block_ids: list[int]


class AdapterLoad(msgspec.Struct, frozen=True):
    """Begin to copy adapter version `version` from the host tier to device slot `slot`. A plan may name the slot once
    the executor has told that the copy ended; equal loads are told apart by their order."""

    slot: int
    version: str


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request's share of a step. Rows come decodes first, then prefill chunks.

    Decode/verify: `num_new` = 1, `start` = None (the true position lives on the device).
    Prefill chunk: `num_new` tokens from `start`; `samples` is true when it ends at the last known token.
    `draft_prefill`: how many known tokens the draft model's KV is caught up over before any drafting; it begins
    where the device says that the draft's KV ends.
    """

    request_id: str
    row: int
    num_new: int
    start: int | None = None
    num_drafts: int = 0
    samples: bool = True
    proposer: str | None = None
    draft_prefill: int = 0
    context_bound: int = 0  # upper bound of tokens in the KV cache after this step, for sizing reads


class StepPlan(msgspec.Struct, kw_only=True):
    """One step's work. Applied in this order: adapter loads begin; new rows, block appends, then the forward."""

    step_id: int
    rows: list[PlanRow]
    new_rows: list[NewRow] = []
    blocks: list[BlockAppend] = []
    adapter_loads: list[AdapterLoad] = []

    @property
    def empty(self) -> bool:
        return not self.rows and not self.adapter_loads

    @property
    def num_tokens(self) -> int:
        return sum(row.num_new + row.num_drafts for row in self.rows)


class RowResult(msgspec.Struct, kw_only=True):
    """What one PlanRow gave: the committed tokens in order (empty for an unfinished prefill)."""

    token_ids: list[int]
    num_drafted: int = 0  # drafts that were really verified
    num_accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None


class StepResult(msgspec.Struct, kw_only=True):
    """Results in the order of the plan's rows."""

    step_id: int
    rows: list[RowResult]
