"""What a trace is made from. Each field is a flag; names and meanings are `vllm bench serve`'s where it has them."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec

from specserve.core.errors import InvalidRequestError

Dataset = Literal["random", "sharegpt", "custom", "timed_trace"]
Assignment = Literal["random", "uniform", "round-robin", "zipf", "skewed"]
RampUp = Literal["linear", "exponential"]
RANDOM_INPUT_LEN, OUTPUT_LEN = 256, 128
ALL_ADAPTERS = "all"  # in place of names
WARM_UP_SEED = 7919  # added to the trace's: warm-ups must not leave its prompts in a prefix cache


class TraceOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which requests, when, on which adapters. Equal options give the same trace on any machine."""

    dataset_name: Dataset = "random"
    dataset_path: str | None = None
    num_prompts: int = 100
    seed: int = 0
    disable_shuffle: bool = False
    input_len: int = RANDOM_INPUT_LEN
    output_len: int | None = None  # None: what the dataset says, or OUTPUT_LEN
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0

    request_rate: float = math.inf  # requests/s
    burstiness: float = 1.0
    ramp_up_strategy: RampUp | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    self_timed: bool | None = None  # None: if the dataset is timed_trace
    timed_trace_sec_multiplier: float = 1.0
    timed_trace_chunk_hash_size: int = 16

    lora_modules: tuple[str, ...] = ()
    lora_assignment: Assignment = "random"
    lora_zipf_exponent: float = 1.0

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    seeded: bool = False
    extra_body: dict[str, Any] = {}

    @property
    def timed(self) -> bool:
        """Whether the dataset says when requests come."""
        return self.dataset_name == "timed_trace" if self.self_timed is None else self.self_timed


TRACE_HELP = {
    "dataset_name": "random tokens; a ShareGPT-format file; custom: JSONL of prompt (or messages), output_len; or "
    "timed_trace: JSONL of timestamp, input_length, output_length, hash_ids",
    "dataset_path": "file of the dataset",
    "num_prompts": "requests",
    "seed": "of prompts, arrivals and the choice of adapters",
    "disable_shuffle": "take a file's requests in its order",
    "input_len": "tokens a random prompt",
    "output_len": f"tokens to generate; default: what the dataset says, or {OUTPUT_LEN}",
    "random_range_ratio": "random lengths lie within (1 ± this) times their mean",
    "random_prefix_len": "tokens that all random prompts begin with, added to their length",
    "request_rate": "requests/s; inf: all at once",
    "burstiness": "shape of the gamma distribution of the times between requests; 1: Poisson, less: in bursts",
    "ramp_up_strategy": "how the rate goes from --ramp-up-start-rps to --ramp-up-end-rps",
    "ramp_up_start_rps": "requests/s at the start",
    "ramp_up_end_rps": "requests/s at the end",
    "self_timed": "send at the dataset's own times; default: for timed_trace",
    "timed_trace_sec_multiplier": "seconds a unit of its timestamps",
    "timed_trace_chunk_hash_size": "tokens that one of its hash_ids stands for",
    "lora_assignment": "how popular adapters are: random (or uniform): equally; zipf: p(i) ∝ i^-s in the order named; "
    "skewed: each 1.5 times as popular as the next; round-robin: in turn",
    "lora_zipf_exponent": "s of zipf",
    "temperature": "default: the server's",
    "top_p": "default: the server's",
    "top_k": "default: the server's",
    "min_p": "default: the server's",
    "frequency_penalty": "default: the server's",
    "presence_penalty": "default: the server's",
    "repetition_penalty": "default: the server's",
    "ignore_eos": "generate all tokens asked for",
    "seeded": "give each request a seed of its own, so that the same engine answers the same again",
}
POSITIVE = ("num_prompts", "input_len", "output_len", "request_rate", "burstiness", "timed_trace_sec_multiplier",
            "timed_trace_chunk_hash_size")  # fmt: skip


def check(options: TraceOptions) -> None:
    """Raise InvalidRequestError naming the first field that is out of range or contradicts another."""
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise refused(name, f"must be positive, got {value}.")
    if not 0.0 <= options.random_range_ratio < 1.0:
        raise refused("random_range_ratio", f"must be in [0, 1), got {options.random_range_ratio}.")
    if options.random_prefix_len < 0 or options.lora_zipf_exponent < 0:
        name = "random_prefix_len" if options.random_prefix_len < 0 else "lora_zipf_exponent"
        raise refused(name, "must not be negative.")
    if options.dataset_name != "random" and options.dataset_path is None:
        raise refused("dataset_path", f"is needed for --dataset-name {options.dataset_name}.")
    if options.timed and options.dataset_name in ("random", "sharegpt"):
        raise refused("self_timed", f"needs a dataset with times; {options.dataset_name} has none.")
    if options.timed and options.request_rate != math.inf:
        raise refused("request_rate", "goes with --no-self-timed: else the dataset says when requests come.")
    _check_ramp_up(options)


def _check_ramp_up(options: TraceOptions) -> None:
    ends = (options.ramp_up_start_rps, options.ramp_up_end_rps)
    if options.ramp_up_strategy is None:
        if ends != (None, None):
            raise refused("ramp_up_strategy", "is needed with --ramp-up-start-rps and --ramp-up-end-rps.")
        return
    if options.request_rate != math.inf or options.timed:
        raise refused("ramp_up_strategy", "says how the rate goes: leave --request-rate and --self-timed out.")
    if any(end is None or not 0 < end < math.inf for end in ends):
        raise refused("ramp_up_strategy", "needs positive --ramp-up-start-rps and --ramp-up-end-rps.")


def sampling_fields(options: TraceOptions) -> dict[str, Any]:
    """The fields of the API call that are the same for all requests."""
    named = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
    fields = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    return fields | ({"ignore_eos": True} if options.ignore_eos else {}) | options.extra_body


def refused(field: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"--{field.replace('_', '-')} {reason}", param=field)
