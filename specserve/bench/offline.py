"""What `bench throughput` and `bench latency` share: a trace given to an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from specserve.bench.acceptance import by_position
from specserve.bench.options import ALL_ADAPTERS, TraceOptions
from specserve.bench.records import RequestRecord, RunRecord, TracedRequest
from specserve.bench.trace import make_trace
from specserve.bench.vocabulary import Vocabulary
from specserve.config import EngineConfig, resolve_paths
from specserve.core.errors import InvalidRequestError
from specserve.core.messages import FinishReason, SpeculationStats
from specserve.core.sampling_params import SamplingParams
from specserve.server.protocol import CompletionBody, sampling_params


class Output(Protocol):
    """specserve.llm.Output, whose module brings torch."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None
    speculation: SpeculationStats


class Engine(Protocol):
    """What is asked of specserve.LLM."""

    def generate(
        self, prompts: list[str | list[int]], params: list[SamplingParams], lora: list[str | None]
    ) -> Sequence[Output]: ...


def offline_trace(engine: EngineConfig, asked: TraceOptions) -> list[TracedRequest]:
    """The trace for this engine, whose own tokenizer and adapters (for `all`) it uses; arrivals do not matter.

    Raises InvalidRequestError naming what is wrong.
    """
    resolved = resolve_paths(engine)
    names = [name for name, _ in resolved.loras]
    if list(asked.lora_modules) == [ALL_ADAPTERS]:
        asked = msgspec.structs.replace(asked, lora_modules=tuple(names))
    trace = make_trace(asked, lambda: Vocabulary.load(resolved.model, "model"))
    for request in trace:
        if request.adapter is not None and request.adapter not in names:
            raise InvalidRequestError(f"No adapter {request.adapter!r} is given by --lora.", param="lora_modules")
        if "messages" in request.fields:
            raise InvalidRequestError("Offline, prompts are text or token ids, not messages.", param="dataset_path")
    return trace


def generate(llm: Engine, trace: Sequence[TracedRequest]) -> RunRecord:
    """All requests in one batch. Records have no events: what comes when is not seen from outside."""
    prompts = [request.prompt for request in trace]
    params = [_params(request) for request in trace]
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, lora=[request.adapter for request in trace])
    seconds = time.perf_counter() - begin
    rest = iter(outputs)  # of each request n in a row
    records = [
        _record(request, [next(rest) for _ in range(one.n)], seconds)
        for request, one in zip(trace, params, strict=True)
    ]
    return RunRecord("specserve", 0, {"batch": len(trace)}, seconds, records)


def _params(request: TracedRequest) -> SamplingParams:
    """As the server reads the same fields."""
    try:
        body = msgspec.convert({"prompt": request.prompt, **request.fields}, CompletionBody)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"--extra-body: {error}", param="extra_body") from error
    return sampling_params(body, max_tokens=request.max_tokens, logprobs=body.logprobs)


def _record(request: TracedRequest, outputs: Sequence[Output], seconds: float) -> RequestRecord:
    """Of all of a request's choices, as a streamed answer's are put together (bench/answers.py)."""
    stats = [output.speculation for output in outputs]
    return RequestRecord(
        index=request.index,
        sent=0.0,
        events=[],
        end=seconds,
        prompt_tokens=request.prompt_tokens,
        output_tokens=sum(len(output.token_ids) for output in outputs),
        text="\n".join(output.text for output in outputs),
        finish_reason=outputs[0].finish_reason,
        adapter=request.adapter,
        drafted_per_position=by_position(one.drafted_per_position for one in stats),
        accepted_per_position=by_position(one.accepted_per_position for one in stats),
    )
