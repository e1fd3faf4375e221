"""`specserve bench latency`: how long one batch takes, again and again, in one process and without HTTP."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from specserve.bench.metrics import Summary, summarise
from specserve.bench.offline import generate, offline_trace
from specserve.bench.options import TraceOptions
from specserve.bench.records import RunRecord
from specserve.config import EngineConfig

PERCENTAGES = (10, 25, 50, 75, 90, 99)


class Latency(msgspec.Struct, frozen=True):
    """Seconds of each iteration, and what its requests come to."""

    latencies: list[float]
    summary: Summary
    made: dict[str, str]  # what it ran on, and in

    def flat(self) -> dict[str, object]:
        """By the names that `vllm bench latency --output-json` writes, and what it lacks."""
        percentiles = {str(p): float(np.percentile(self.latencies, p)) for p in PERCENTAGES}
        values = {
            "avg_latency": float(np.mean(self.latencies)),
            "latencies": self.latencies,
            "percentiles": percentiles,
        }
        return values | (self.summary.acceptance.flat() if self.summary.acceptance else {})

    def text(self) -> str:
        """As `vllm bench latency` prints it."""
        lines = [f"Avg latency: {np.mean(self.latencies):.4f} seconds"]
        lines += [f"{p}% percentile latency: {np.percentile(self.latencies, p):.4f} seconds" for p in PERCENTAGES]
        if self.summary.acceptance is not None:
            lines.append(f"Drafts accepted: {self.summary.acceptance.rate:.1%}")
        return "\n".join(lines)


def bench_latency(
    engine: EngineConfig,
    asked: TraceOptions,
    *,
    iterations: int,
    warm_ups: int,
    on_iteration: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> Latency:
    """Load the engine and generate the same batch over and over, `warm_ups` times uncounted: without a prefix cache, or
    all but the first would find their prompts in it. Raises SpecserveError."""
    from specserve.llm import LLM  # noqa: PLC0415  torch: only where it is used

    trace = offline_trace(engine, asked)
    runs: list[RunRecord] = []
    llm = LLM(msgspec.structs.replace(engine, enable_prefix_caching=False), progress=progress)
    try:
        for iteration in range(warm_ups + iterations):
            run = generate(llm, trace)
            if iteration >= warm_ups:
                runs.append(run)
            on_iteration()
    finally:
        llm.close()
    return Latency([run.duration for run in runs], summarise(runs), llm.engine.ready.facts())
