"""A trace: the same requests at the same times for whoever is measured."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from specserve.bench.arrivals import DIGITS, arrival_times
from specserve.bench.datasets import Sample, Tokens, samples
from specserve.bench.facts import check_writable
from specserve.bench.lines import read_lines
from specserve.bench.options import TraceOptions, check, sampling_fields
from specserve.bench.popularity import assign
from specserve.bench.records import TracedRequest
from specserve.core.errors import InvalidRequestError


def make_trace(options: TraceOptions, tokens: Callable[[], Tokens]) -> list[TracedRequest]:
    """The trace that the options describe, ordered by arrival; `tokens` loads the tokenizer if the dataset needs it.

    Prompts, arrivals and adapters are drawn from streams of their own: another rate leaves the prompts as they are.
    Raises InvalidRequestError naming the option.
    """
    check(options)
    found = samples(options, _stream(options, "prompts"), cache(tokens))
    times = _own_times(found) if options.timed else arrival_times(len(found), options, _stream(options, "arrivals"))
    adapters = assign(
        len(found), options.lora_modules, options.lora_assignment, _stream(options, "adapters"),
        exponent=options.lora_zipf_exponent,
    )  # fmt: skip
    order = sorted(range(len(found)), key=times.__getitem__)  # stable: equal times keep the dataset's order
    seeds = _stream(options, "seeds")
    common = sampling_fields(options)
    return [
        TracedRequest(
            index=place,
            arrival=times[source],
            prompt=found[source].prompt,
            prompt_tokens=found[source].prompt_tokens,
            max_tokens=found[source].max_tokens,
            adapter=found[source].adapter or adapters[source],
            fields=_fields(found[source], common, seeds if options.seeded else None),
        )
        for place, source in enumerate(order)
    ]


def _fields(sample: Sample, common: dict[str, Any], seeds: random.Random | None) -> dict[str, Any]:
    return common | sample.fields | ({"seed": seeds.getrandbits(31)} if seeds is not None else {})


def _own_times(found: Sequence[Sample]) -> list[float]:
    """The samples' arrivals, from the first one's."""
    times = [sample.arrival or 0.0 for sample in found]
    return [round(time - min(times), DIGITS) for time in times]


def _stream(options: TraceOptions, name: str) -> random.Random:
    return random.Random(f"{options.seed} {name}")


def write_trace(path: Path, trace: Sequence[TracedRequest]) -> None:
    """One request a line. Raises InvalidRequestError."""
    check_writable(path, "save_trace")
    path.write_bytes(msgspec.json.Encoder().encode_lines(trace))


def read_trace(path: Path) -> list[TracedRequest]:
    """What `write_trace` wrote; raises InvalidRequestError naming the line."""
    trace = [request for _, request in read_lines(path, TracedRequest, "trace")]
    if not trace:
        raise InvalidRequestError(f"{path} holds no request.", param="trace")
    return trace


def as_text(trace: Sequence[TracedRequest], decode: Callable[[Sequence[int]], str]) -> list[TracedRequest]:
    """The trace with every prompt of token ids as its text, for servers and endpoints that take only that. Read again,
    such a text may have other tokens; the server tells how many."""
    return [
        msgspec.structs.replace(request, prompt=decode(request.prompt), prompt_tokens=0)
        if isinstance(request.prompt, list)
        else request
        for request in trace
    ]
