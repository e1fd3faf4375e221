"""What a benchmark writes down: plain data between the load, the statistics and the report, one JSON object a line.

Times are seconds of one monotonic clock, from the start of the run that a record belongs to.
"""

from __future__ import annotations

from typing import Any

import msgspec

Load = dict[str, float | int | str]  # what was varied: {"concurrency": 8} or {"rate": 2.0}


class TracedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request of a trace. The trace is the same for all variants: request `index` of A and of B are a pair."""

    index: int
    arrival: float  # s after the start; 0.0 for all where only concurrency bounds them
    prompt: str | list[int]  # text, or token ids where the server takes them
    prompt_tokens: int  # as far as known; 0: not known
    max_tokens: int
    adapter: str | None = None
    fields: dict[str, Any] = {}  # further fields of the API call: temperature, seed, ignore_eos, …


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one event of a stream brought. There are a hundred thousand of them, which no garbage collection visits."""

    time: float  # s
    tokens: int


class RequestRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request went."""

    index: int  # in the trace
    sent: float  # s
    events: list[Event]
    end: float  # s: the stream was closed
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None  # what went wrong, for a person; None: nothing did
    adapter: str | None = None
    drafted_per_position: list[int] = []  # of usage.speculation, where the server tells
    accepted_per_position: list[int] = []


class RunRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run of one variant over one trace (or its part): a block of the interleaved comparison."""

    variant: str  # "A", "B" or a name
    round: int  # from 0; runs of one round belong together
    load: Load
    duration: float  # s, from the first request sent to the last stream's end
    requests: list[RequestRecord]
    complete: bool = True  # False: it was cut short; what had ended by then is here


class VariantInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a variant was: for the report's reader and for who repeats it."""

    variant: str
    title: str  # short, of its flags
    command: list[str] = []
    url: str | None = None
    server: dict[str, Any] = {}  # model, versions, device, as far as it told


class Comparison(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of a comparison: the file that a report is made from."""

    variants: list[VariantInfo]
    runs: list[RunRecord]
    facts: dict[str, Any] = {}  # date, machine, command, seed, dataset, how the variants took turns
