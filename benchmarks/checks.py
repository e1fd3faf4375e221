"""Repeatability of greedy outputs: the same request again and again, and alone against in a batch."""

from __future__ import annotations

import random

from benchmarks.engines import Engine, Mode

REPEATS = 10
BATCH = 64
ALONE = 16  # of the batch, also run alone
PROMPT = 96
NEW_TOKENS = 64


def check_repeatability(
    engine: Engine, mode: Mode, vocab: int, batch: int = BATCH, alone: int = ALONE
) -> dict[str, object]:
    """`identical`: REPEATS runs of one request, one after another, gave the same tokens. `alone_equal`: the share of
    requests whose tokens alone are those in a batch; sums in bf16 depend on the batch's shape, so it may be below 1."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab) for _ in range(PROMPT)] for _ in range(batch)]
    adapters = mode.adapters(batch)
    repeats = [engine.generate(prompts[:1], adapters[:1], NEW_TOKENS)[0] for _ in range(REPEATS)]
    together = engine.generate(prompts, adapters, NEW_TOKENS)
    single = [engine.generate(prompts[i : i + 1], adapters[i : i + 1], NEW_TOKENS)[0] for i in range(alone)]
    equal = sum(one == both for one, both in zip(single, together, strict=False))
    return {
        "identical": all(tokens == repeats[0] for tokens in repeats), "repeats": REPEATS,
        "alone_equal": round(equal / alone, 4), "alone": alone, "batch": batch,
    }  # fmt: skip
