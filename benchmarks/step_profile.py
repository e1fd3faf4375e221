"""Where the time of a steady decode step goes.

    python -m benchmarks.step_profile PAIR --mode lora8_spec4 --batch 8 [--steps 20] [--inp 512] [--trace FILE.json.gz]

Fills an engine with a batch, decodes until the prompts are behind it, and records some steps with torch.profiler: a
trace for chrome://tracing or ui.perfetto.dev, and a table. On a GPU the table lists kernels and copies, what they
cover, and where nothing runs; on a CPU, operators.

The profiler slows the host, so gaps between replays look longer than they are: compare the step's time with the
unprofiled one, which is measured first.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import Mode, Setup
from benchmarks.engines.specserve import SpecserveEngine
from benchmarks.shapes import load_settings
from benchmarks.trace_table import device_events, table
from specserve.core.sampling_params import SamplingParams
from specserve.engine.core.core import EngineCore

SETTLING_STEPS = 16


def fill(engine: SpecserveEngine, mode: Mode, batch: int, inp: int, vocab: int, steps: int) -> None:
    """Requests long enough for all steps, decoding."""
    core = engine.core
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab) for _ in range(inp)] for _ in range(batch)]
    most = core.ready.max_model_len - inp
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=most)
    for request in engine.requests(prompts, mode.adapters(batch), params):
        core.add_request(request)
    while core.scheduler.waiting or any(request.prefilling for request in core.scheduler.running):
        run_steps(core, 1)
    run_steps(core, SETTLING_STEPS)


def run_steps(core: EngineCore, steps: int) -> float:
    """Seconds that so many steps took."""
    begin = time.perf_counter()
    for _ in range(steps):
        core.step()
        core.poll_replies()
    return time.perf_counter() - begin


def record(core: EngineCore, steps: int, trace: Path) -> str:
    """Profile the steps, write the trace, return the table."""
    on_gpu = core.built.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities):
        run_steps(core, 3)  # starting the recorder takes long, once
    with profile(activities=activities) as recorded:
        run_steps(core, steps)
        if on_gpu:
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(trace))
    if not on_gpu:
        return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48))
    return table(device_events(json.loads(gzip.decompress(trace.read_bytes()))), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("--mode", default="lora0_spec0")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inp", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trace", type=Path, default=Path("build/step-trace.json.gz"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.trace.suffix != ".gz":
        parser.error("--trace must end in .gz.")
    settings = load_settings(args.pair)
    mode = Mode.parse(args.mode)
    engine = SpecserveEngine(Setup(args.pair, mode, args.device, settings.dtype))
    try:
        fill(engine, mode, args.batch, args.inp, settings.shape("target").vocab - 256, args.steps)
        unprofiled = run_steps(engine.core, args.steps) / args.steps
        print(record(engine.core, args.steps, args.trace))
        print(f"{args.mode}, batch {args.batch}: {unprofiled * 1e3:.3f} ms a step unprofiled; trace in {args.trace}.")
    finally:
        engine.close()


if __name__ == "__main__":
    main()
