"""Messages between the API process and the engine process, msgpack through msgspec (tagged unions both ways)."""

from __future__ import annotations

from typing import Literal

import msgspec

from specserve.core.errors import BY_CODE, SpecserveError
from specserve.core.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class LoraRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter of a request, by name, with its scale (`lora: "sql"` is `LoraRef("sql")`)."""

    name: str
    scale: float = 1.0


# --- client → engine ---------------------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, tag="add", frozen=True, kw_only=True):
    """One sequence to generate. `output_ids` resumes it: tokens that were generated before, anywhere.

    `params.n` is 1 here (the client splits n); `seed` is what the random numbers are keyed by (always set).
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    lora: tuple[LoraRef, ...] = ()
    output_ids: list[int] = []
    cache_salt: str = ""


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    """Stop these requests now; unknown ids are ignored (they may have just finished)."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, tag="load", frozen=True, kw_only=True):
    """Load or reload (`replace`) an adapter from a folder; answered by a Reply with an AdapterInfo."""

    call_id: int
    name: str
    path: str
    draft_path: str | None = None  # default: the folder's subfolder draft/, if there is one
    pinned: bool = False
    replace: bool = False
    weight: float = 1.0  # its share of tokens beside other adapters that have requests waiting; > 0
    read: bool = True  # False: only look at the folder; the first request that needs it reads it


class UnloadAdapter(msgspec.Struct, tag="unload", frozen=True, kw_only=True):
    """Forget a name. Requests that use it finish on the version they began with; then its memory is freed."""

    call_id: int
    name: str


class PinAdapter(msgspec.Struct, tag="pin", frozen=True, kw_only=True):
    """Pin: never evicted from its device slot. Unpin with pinned=False."""

    call_id: int
    name: str
    pinned: bool = True


class ListAdapters(msgspec.Struct, tag="list", frozen=True, kw_only=True):
    """Answered by a Reply whose `adapters` holds every registered adapter, or the one asked for, if there is one."""

    call_id: int
    name: str | None = None


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the engine process after the step in flight."""


ToEngine = AddRequest | AbortRequests | LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters | Shutdown

# --- engine → client ---------------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probability of one generated token under the target's raw distribution, and the top alternatives."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []  # (token id, logprob), most likely first


class SpeculationStats(msgspec.Struct):
    """One request's drafting so far. `accepted_per_position[j]`: rounds whose draft j was accepted."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_per_position: list[int] = []
    accepted_per_position: list[int] = []


class ErrorInfo(msgspec.Struct, frozen=True):
    """A SpecserveError on the wire: `code` is a key of `errors.BY_CODE`."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: SpecserveError) -> ErrorInfo:
        return cls(error.code or error.type, error.message, error.param)

    def to_error(self) -> SpecserveError:
        return BY_CODE.get(self.code, SpecserveError)(self.message, param=self.param)


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step gave one request: only the new tokens. The last one carries `finish_reason`."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop or EOS token that ended it (it is not in token_ids)
    cached_tokens: int = 0  # prompt tokens served from the prefix cache
    speculation: SpeculationStats | None = None  # with the last output; with stop strings, with every one
    queue_seconds: float | None = None  # how long it waited for its first step; with the first output
    error: ErrorInfo | None = None


class AdapterInfo(msgspec.Struct, kw_only=True):
    """One registered adapter as the API lists it."""

    name: str
    path: str
    version: str  # content hash of config and weights, target and companion; "" before the first read
    tier: Literal["disk", "host", "device"]  # where requests find it; one that is on its way is still where it was
    state: Literal["reading", "loading"] | None = None  # on its way from disk to host memory, or to the device
    slot: int | None = None
    rank: int | None = None  # this, num_bytes and has_draft: of the last read, None before the first
    num_bytes: int | None = None
    weight: float = 1.0
    pinned: bool = False
    has_draft: bool | None = None
    running: int = 0
    requests: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    last_used: float | None = None  # seconds since the epoch


class AdapterTierStats(msgspec.Struct, frozen=True, kw_only=True):
    """The tiers of adapters as a whole: what is full now, and monotonic counters since start."""

    host_bytes: int = 0
    max_host_bytes: int = 0
    slots: int = 0
    slots_used: int = 0  # that hold an adapter, in use or warm
    reads: int = 0  # folders read into host memory, well or badly
    read_seconds: float = 0.0
    loads: int = 0  # copies from host memory into a slot
    load_seconds: float = 0.0
    evictions_host: int = 0  # for room; unloads and reloads are none
    evictions_device: int = 0


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges and monotonic counters since start; sent with outputs, at most every 100 ms and at idle.

    Of adapters an engine tells what changed since it last told: all of them at first, then few of a thousand.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_drafts: int = 0  # rounds
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    drafted_per_pos: list[int] = []
    accepted_per_pos: list[int] = []
    draft_length: float = 0.0  # mean of what was chosen for the rows of the last step that left it to the engine
    step_cost_ratio: float = 1.0  # steps' time over what the table of costs predicted, lately
    probed_rows: int = 0  # drafts made only to learn whether they are accepted
    probe_seconds: float = 0.0  # what these took
    adapters: list[AdapterInfo] = []  # those that are new or changed; in the client's view, all
    removed_adapters: list[str] = []  # to be taken out before `adapters` is put in: a name may be both
    adapter_tiers: AdapterTierStats = AdapterTierStats()


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """First message of an engine process: what the client must know to validate requests."""

    model: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    proposers: list[str]
    num_blocks: int
    device: str
    dtype: str  # of activations and cache, and of weights that are not quantised
    quantization: str = "none"  # of the model's weights
    draft_quantization: str | None = None  # of the draft model's; None: there is none

    def facts(self) -> dict[str, str]:
        """What a figure is worthless without: the device, and what weights are kept in, whatever `auto` chose."""
        facts = {"device": self.device, "dtype": self.dtype, "weights": self._kept_in(self.quantization)}
        if self.draft_quantization is not None:
            facts["draft_weights"] = self._kept_in(self.draft_quantization)
        return facts

    def _kept_in(self, quantization: str) -> str:
        return self.dtype if quantization == "none" else quantization


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Start-up failed with a user error (say, an unreadable model)."""

    error: ErrorInfo


class StepOutputs(msgspec.Struct, tag="outputs"):
    """Everything one step produced."""

    outputs: list[RequestOutput]
    stats: EngineStats | None = None


class Reply(msgspec.Struct, tag="reply", kw_only=True):
    """Answer to a call with a call_id."""

    call_id: int
    error: ErrorInfo | None = None
    adapters: list[AdapterInfo] = []


FromEngine = Ready | Failed | StepOutputs | Reply
