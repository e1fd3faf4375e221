"""What requests ask: prompts and lengths, from random tokens or from a file."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from specserve.bench.lines import read_file, read_lines
from specserve.bench.options import OUTPUT_LEN, Dataset, TraceOptions
from specserve.core.errors import InvalidRequestError

# What `vllm bench serve` leaves out of a ShareGPT file.
SHORTEST, LONGEST_PROMPT, LONGEST_TOTAL = 4, 1024, 2048


class Tokens(Protocol):
    """What datasets need of a tokenizer (`Vocabulary` is one)."""

    ids: list[int]

    def lengths(self, texts: Sequence[str]) -> list[int]: ...


class Sample(msgspec.Struct, frozen=True):
    """A request without its adapter; `arrival` where the dataset tells, s after the first one."""

    prompt: str | list[int]
    prompt_tokens: int  # 0: not known
    max_tokens: int
    arrival: float | None = None
    adapter: str | None = None
    fields: dict[str, Any] = {}


class Turn(msgspec.Struct):
    """One of a ShareGPT conversation."""

    value: str


class Conversation(msgspec.Struct):
    conversations: list[Turn] = []


class CustomLine(msgspec.Struct, kw_only=True):
    """Of a custom file; others of its fields are left alone. `output_tokens` is vLLM's name of `output_len`."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    output_len: int | None = None
    output_tokens: int | None = None
    lora: str | None = None
    timestamp: float | None = None


class TimedLine(msgspec.Struct):
    """Of a timed trace, as Mooncake publishes them: equal beginnings of hash_ids are equal beginnings of prompts."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def samples(options: TraceOptions, rng: random.Random, tokens: Callable[[], Tokens]) -> list[Sample]:
    """The dataset's requests, `num_prompts` of them; a file's are taken again where they are too few (but a timed
    trace's, whose times would be taken again too). `tokens` loads the tokenizer, for datasets that need it.

    Raises InvalidRequestError for a file that cannot be read, naming the line, or that leaves nothing.
    """
    found = _READERS[options.dataset_name](options, rng, tokens)
    if not found:
        raise InvalidRequestError(f"{options.dataset_path} leaves no request.", param="dataset_path")
    if options.timed:
        return found[: options.num_prompts]
    return [found[index % len(found)] for index in range(options.num_prompts)]


def _random(options: TraceOptions, rng: random.Random, tokens: Callable[[], Tokens]) -> list[Sample]:
    ids = tokens().ids
    prefix = rng.choices(ids, k=options.random_prefix_len)

    def about(length: int) -> int:
        spread = options.random_range_ratio * length
        return rng.randint(max(math.floor(length - spread), 1), math.ceil(length + spread))

    def sample() -> Sample:
        prompt = prefix + rng.choices(ids, k=about(options.input_len))
        return Sample(prompt, len(prompt), about(options.output_len or OUTPUT_LEN))

    return [sample() for _ in range(options.num_prompts)]


def _sharegpt(options: TraceOptions, rng: random.Random, tokens: Callable[[], Tokens]) -> list[Sample]:
    """First question and the answer's length of each conversation. Tokenised in turn until there are enough: the file
    has 90,000, and a few hundred are asked for."""
    path = options.dataset_path or ""
    try:
        read = msgspec.json.decode(read_file(path, "dataset_path"), type=list[Conversation])
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"{path} is no ShareGPT file: {error}", param="dataset_path") from error
    pairs = [(one.conversations[0].value, one.conversations[1].value) for one in read if len(one.conversations) > 1]
    _shuffle(pairs, options, rng)
    found: list[Sample] = []
    for start in range(0, len(pairs), options.num_prompts):
        part = pairs[start : start + options.num_prompts]
        asked, answered = (tokens().lengths([pair[side] for pair in part]) for side in (0, 1))
        for (prompt, _), length, answer in zip(part, asked, answered, strict=True):
            output = options.output_len or answer
            if min(length, output) >= SHORTEST and length <= LONGEST_PROMPT and length + output <= LONGEST_TOTAL:
                found.append(Sample(prompt, length, output))
        if len(found) >= options.num_prompts:
            break
    return found


def _custom(options: TraceOptions, rng: random.Random, tokens: Callable[[], Tokens]) -> list[Sample]:
    found = []
    for where, line in read_lines(options.dataset_path or "", CustomLine, "dataset_path"):
        if (line.prompt is None) == (line.messages is None):
            raise InvalidRequestError(f'{where}: it must hold one of "prompt" and "messages".', param="dataset_path")
        output = options.output_len or line.output_len or line.output_tokens or OUTPUT_LEN
        prompt = line.prompt or ""
        known = len(prompt) if isinstance(prompt, list) else 0
        fields = {"messages": line.messages} if line.messages is not None else {}
        if options.timed and line.timestamp is None:
            raise InvalidRequestError(f'{where}: --self-timed needs its "timestamp".', param="dataset_path")
        arrival = line.timestamp * options.timed_trace_sec_multiplier if line.timestamp is not None else None
        found.append(Sample(prompt, known, output, arrival, line.lora, fields))
    if not options.timed:
        _shuffle(found, options, rng)
    return found


def _timed(options: TraceOptions, rng: random.Random, tokens: Callable[[], Tokens]) -> list[Sample]:
    """Prompts of random tokens, a chunk of its own for each hash id; those without are unlike any other."""
    ids, size = tokens().ids, options.timed_trace_chunk_hash_size
    chunks: dict[int, list[int]] = {}
    found = []
    for _, line in read_lines(options.dataset_path or "", TimedLine, "dataset_path"):
        prompt: list[int] = []
        for chunk in line.hash_ids:
            if chunk not in chunks:
                chunks[chunk] = rng.choices(ids, k=size)
            prompt += chunks[chunk]
        prompt += rng.choices(ids, k=max(line.input_length - len(prompt), 0))
        del prompt[max(line.input_length, 1) :]
        output = options.output_len or max(line.output_length, 1)
        arrival = line.timestamp * options.timed_trace_sec_multiplier
        found.append(Sample(prompt, len(prompt), output, arrival))
        if len(found) == options.num_prompts:
            break
    return found


_READERS: Mapping[Dataset, Callable[[TraceOptions, random.Random, Callable[[], Tokens]], list[Sample]]]
_READERS = MappingProxyType({"random": _random, "sharegpt": _sharegpt, "custom": _custom, "timed_trace": _timed})


def _shuffle(items: list[Any], options: TraceOptions, rng: random.Random) -> None:
    if not options.disable_shuffle:
        rng.shuffle(items)
