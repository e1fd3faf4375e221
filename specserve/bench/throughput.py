"""`specserve bench throughput`: all requests at once, in one process and without HTTP."""

from __future__ import annotations

import msgspec

from specserve.bench.metrics import Summary, summarise
from specserve.bench.offline import generate, offline_trace
from specserve.bench.options import WARM_UP_SEED, TraceOptions
from specserve.bench.records import RunRecord
from specserve.config import EngineConfig


class Throughput(msgspec.Struct, frozen=True):
    """One run's records and what they come to."""

    run: RunRecord
    summary: Summary
    made: dict[str, str]  # what it ran on, and in

    def flat(self) -> dict[str, float]:
        """By the names that `vllm bench throughput --output-json` writes, and what it lacks."""
        found = self.summary
        values = {
            "elapsed_time": found.duration,
            "num_requests": found.completed,
            "total_num_tokens": found.total_input_tokens + found.total_output_tokens,
            "requests_per_second": found.request_throughput,
            "tokens_per_second": found.total_token_throughput,
            "output_tokens_per_second": found.output_throughput,
        }
        return values | (found.acceptance.flat() if found.acceptance else {})

    def text(self) -> str:
        """As `vllm bench throughput` prints it."""
        found = self.summary
        lines = [
            f"Throughput: {found.request_throughput:.2f} requests/s, "
            f"{found.total_token_throughput:.2f} total tokens/s, {found.output_throughput:.2f} output tokens/s",
            f"Total num prompt tokens:  {found.total_input_tokens}",
            f"Total num output tokens:  {found.total_output_tokens}",
        ]
        if found.acceptance is not None:
            lines.append(f"Drafts accepted:          {found.acceptance.rate:.1%}")
        return "\n".join(lines)


def bench_throughput(
    engine: EngineConfig, asked: TraceOptions, *, num_warmups: int, progress: bool = False
) -> Throughput:
    """Load the engine, generate `num_warmups` requests by another seed, then the trace. Raises SpecserveError."""
    from specserve.llm import LLM  # noqa: PLC0415  torch: only where it is used

    trace = offline_trace(engine, asked)
    others = msgspec.structs.replace(asked, num_prompts=num_warmups, seed=asked.seed + WARM_UP_SEED)
    warm_ups = offline_trace(engine, others) if num_warmups else []
    llm = LLM(engine, progress=progress)
    try:
        if warm_ups:
            generate(llm, warm_ups)
        run = generate(llm, trace)
    finally:
        llm.close()
    return Throughput(run, summarise([run]), llm.engine.ready.facts())
