"""A long context: how near prefill is to the device's arithmetic, and decode to its memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.engines import Mode, Setup, release_memory
from benchmarks.engines.specserve import Sequel, SpecserveEngine
from benchmarks.shapes import PairSettings, Shape
from specserve.core.sampling_params import SamplingParams

CONTEXT = 32768
BATCH = 8
NEW_TOKENS = 96
COPY_BYTES = 4.0e12  # a second: what an H200 copies in practice


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Arithmetic of one prompt: 2 a weight and token (the head once), and causal attention.

    A query against t keys costs 4·t·heads·head_dim (scores and values); over a causal prompt t averages tokens/2.
    """
    head = shape.hidden * shape.vocab
    linear = 2.0 * ((shape.linear_weights - head) * tokens + head)
    attention = 4.0 * shape.heads * shape.head_dim * tokens * tokens / 2 * shape.layers
    return linear + attention


def decode_bytes(shape: Shape, batch: int, context: int, itemsize: int) -> float:
    """What one decode step reads: every weight once, and each sequence's cache."""
    return float(itemsize) * (shape.linear_weights + batch * context * shape.kv_values)


def run_long(engine: SpecserveEngine, batch: int, inp: int, out: int, vocab: int) -> tuple[float, list[Sequel]]:
    """Seconds from the first request to everybody's first token, and what the requests got."""
    rng = random.Random()
    prompts = [[rng.randrange(vocab) for _ in range(inp)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=out, ignore_eos=True)
    begin = time.perf_counter()
    sequels = engine.run(engine.requests(prompts, [None] * batch, params))
    return max(sequel.arrivals[0] for sequel in sequels) - begin, sequels


def decode_seconds(sequels: Sequence[Sequel]) -> float:
    """A step's time while all of them decode: from the last one's first token to the first one's last."""
    began = max(sequel.arrivals[0] for sequel in sequels)
    ended = min(sequel.arrivals[-1] for sequel in sequels)
    steps = max(sum(began < at <= ended for at in sequel.arrivals) for sequel in sequels)
    return (ended - began) / steps if steps else float("nan")


def measure_long(setup: Setup, settings: PairSettings, context: int = CONTEXT) -> dict[str, object]:
    """A prompt of `context` tokens alone, then BATCH of them decoding together, without adapters."""
    shape = settings.shape("target")
    vocab = shape.vocab - 256
    engine = SpecserveEngine(replace(setup, mode=Mode(0, 0), max_model_len=context))
    try:
        inp = context - NEW_TOKENS
        run_long(engine, 1, inp, 1, vocab)
        prefill, _ = run_long(engine, 1, inp, 1, vocab)
        run_long(engine, BATCH, 64, NEW_TOKENS, vocab)
        _, sequels = run_long(engine, BATCH, inp, NEW_TOKENS, vocab)
    finally:
        engine.close()
        del engine
        release_memory()
    step = decode_seconds(sequels)
    itemsize = 2 if settings.dtype == "bfloat16" else 4
    floor = decode_bytes(shape, BATCH, context, itemsize) / COPY_BYTES
    return {
        "context": context, "batch": BATCH, "prefill_s": round(prefill, 4),
        "prefill_tflops": round(prefill_flops(shape, inp) / prefill / 1e12, 1),
        "decode_ms_per_tok": round(step * 1e3, 3), "decode_floor_ms": round(floor * 1e3, 3),
        "decode_of_floor": round(floor / step, 3),
    }  # fmt: skip
