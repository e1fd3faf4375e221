"""`specserve bench serve`: a trace sent to one running server, and what came of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from specserve.bench.client import Client, connect
from specserve.bench.load import run_load
from specserve.bench.options import ALL_ADAPTERS, WARM_UP_SEED, TraceOptions
from specserve.bench.records import Load, RequestRecord, RunRecord, TracedRequest, VariantInfo
from specserve.bench.target import CHAT, COMPLETIONS, Engine, Found, Target, ask_version, look
from specserve.bench.trace import as_text, make_trace, read_trace, write_trace
from specserve.bench.vocabulary import Vocabulary
from specserve.core.errors import InvalidRequestError

READY_POLL_SECONDS = 0.5

Backend = Literal["auto", "specserve", "vllm", "sglang", "tgi", "openai", "openai-chat"]


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The server to be measured and how; the trace's options are TraceOptions."""

    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str = COMPLETIONS
    backend: Backend = "auto"
    model: str | None = None
    tokenizer: str | None = None
    api_key: str | None = None
    max_concurrency: int | None = None
    num_warmups: int = 0
    ready_check_timeout_sec: float = 0.0
    token_counts: bool = False
    trace: str | None = None
    save_trace: str | None = None
    label: str | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str | None = None
    result_filename: str | None = None

    @property
    def url(self) -> str:
        return (self.base_url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


SERVE_HELP = {
    "base_url": "of the server; default: http://HOST:PORT",
    "host": "of the server",
    "port": "of the server",
    "endpoint": f"{COMPLETIONS} or {CHAT}",
    "backend": "whose dialect the server speaks; auto: asked of it; openai-chat: any, at " + CHAT,
    "model": "name of the base model in the API; default: the first that the server lists",
    "tokenizer": "folder or hub id, for random tokens and lengths; default: what the server says its model is",
    "api_key": "default: SPECSERVE_API_KEY",
    "max_concurrency": "requests at a time; default: no limit",
    "num_warmups": "requests sent before, of the same dataset by another seed, which are not counted",
    "ready_check_timeout_sec": "seconds to wait for the server to answer",
    "token_counts": "have the server tell how many tokens each event brings, which costs it a little",
    "trace": "send the requests of this file, one that --save-trace wrote, instead of a dataset's",
    "save_trace": "write the requests to this file of JSON lines",
    "label": "name of the result; default: the backend's",
    "save_result": "add the figures to a file of JSON lines",
    "save_detailed": "with each request's times and text",
    "result_dir": "folder of that file [.]",
    "result_filename": "the file, to which a line is added; default: made of label, rate, concurrency and model",
}


class Prepared(msgspec.Struct, frozen=True):
    """All that can be wrong was looked at: what is left is to send it."""

    target: Target
    trace: list[TracedRequest]
    warm_ups: list[TracedRequest]
    made: dict[str, str]  # version, device and weights, as far as the server told

    @property
    def info(self) -> VariantInfo:
        told = {"engine": self.target.engine, "model": self.target.model} | self.made
        return VariantInfo(self.target.engine, self.target.engine, url=self.target.url, server=told)


async def prepare(options: ServeOptions, asked: TraceOptions) -> Prepared:
    """Look at the server and make the trace; raises InvalidRequestError naming what is wrong."""
    found = await _wait_and_look(options)
    engine, endpoint = _dialect(options, found)
    target = Target(
        url=options.url, engine=engine, model=options.model or found.model, endpoint=endpoint,
        headers=options.headers, token_counts=options.token_counts,
    )  # fmt: skip
    asked = msgspec.structs.replace(asked, lora_modules=_adapters(asked.lora_modules, found))

    @cache
    def tokens() -> Vocabulary:
        return Vocabulary.load(options.tokenizer or found.root)

    trace = make_trace(asked, tokens) if options.trace is None else read_trace(Path(options.trace))
    if options.save_trace is not None:
        write_trace(Path(options.save_trace), trace)
    warm_ups = _warm_ups(options.num_warmups, asked, tokens)
    made = await ask_version(target)
    return Prepared(target, _fitting(trace, target, tokens), _fitting(warm_ups, target, tokens), made)


async def measure(
    prepared: Prepared,
    options: ServeOptions,
    asked: TraceOptions,
    on_end: Callable[[RequestRecord], None],
    stop: asyncio.Event,
) -> RunRecord:
    """Send the warm-ups, then the trace. Raises InvalidRequestError if no warm-up succeeds: neither would the rest."""
    async with connect(prepared.target) as client:
        await _warm_up(client, prepared.warm_ups, options.max_concurrency, stop)
        return await run_load(
            client, prepared.trace, max_concurrency=options.max_concurrency, load=_load(options, asked),
            variant=prepared.target.engine, on_end=on_end, stop=stop,
        )  # fmt: skip


def _load(options: ServeOptions, asked: TraceOptions) -> Load:
    """What a reader of the records compares them along."""
    load: Load = {}
    if options.max_concurrency is not None:
        load["concurrency"] = options.max_concurrency
    if options.trace is None and asked.request_rate != math.inf:
        load["rate"] = asked.request_rate
    return load


async def _warm_up(
    client: Client, requests: Sequence[TracedRequest], max_concurrency: int | None, stop: asyncio.Event
) -> None:
    if not requests:
        return
    run = await run_load(client, requests, max_concurrency=max_concurrency, stop=stop)
    errors = [record.error for record in run.requests if record.error is not None]
    if errors and len(errors) == len(run.requests):
        raise InvalidRequestError(f"All warm-up requests failed: {errors[0]}", param="num_warmups")


def _dialect(options: ServeOptions, found: Found) -> tuple[Engine, str]:
    """As asked for, or as the server says."""
    if options.backend == "openai-chat":
        return "openai", CHAT if options.endpoint == COMPLETIONS else options.endpoint
    return found.engine if options.backend == "auto" else options.backend, options.endpoint


async def _wait_and_look(options: ServeOptions) -> Found:
    end = time.monotonic() + options.ready_check_timeout_sec
    while True:
        try:
            return await look(options.url, options.headers)
        except InvalidRequestError:
            if time.monotonic() >= end:
                raise
        await asyncio.sleep(READY_POLL_SECONDS)


def _adapters(names: Sequence[str], found: Found) -> tuple[str, ...]:
    """The names asked for, `all` being those that the server lists. Not every server lists its adapters."""
    if list(names) == [ALL_ADAPTERS]:
        if not found.adapters:
            raise InvalidRequestError("--lora-modules all: the server lists no adapter.", param="lora_modules")
        return tuple(found.adapters)
    missing = [name for name in names if name not in found.adapters]
    if missing and found.engine in ("specserve", "vllm"):
        has = ", ".join(found.adapters[:8]) or "none"
        raise InvalidRequestError(
            f"The server lists no adapter {missing[0]!r}, but {has}; name those, or all.", param="lora_modules"
        )
    return tuple(names)


def _warm_ups(count: int, asked: TraceOptions, tokens: Callable[[], Vocabulary]) -> list[TracedRequest]:
    if count < 1:
        return []
    others = msgspec.structs.replace(asked, num_prompts=count, seed=asked.seed + WARM_UP_SEED)
    return [msgspec.structs.replace(request, arrival=0.0) for request in make_trace(others, tokens)]


def _fitting(trace: Sequence[TracedRequest], target: Target, tokens: Callable[[], Vocabulary]) -> list[TracedRequest]:
    """The trace as the endpoint takes it: text where it takes no ids; messages only for a chat."""
    if not target.chat and any("messages" in request.fields for request in trace):
        raise InvalidRequestError(f"The dataset holds messages: use --endpoint {CHAT}.", param="endpoint")
    if target.takes_ids or not any(isinstance(request.prompt, list) for request in trace):
        return list(trace)
    return as_text(trace, tokens().decode)
