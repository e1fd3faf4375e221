"""Which quantisation "auto" stands for: what makes a draft's decoding faster where it runs, whatever is asked of it.

On a GPU that is none. Weights of one byte are faster for one stream without companions, and slower with them or for
many streams (docs/performance.md): who serves the one, or lacks memory, says so. On a CPU torch's weight-only int8
product beats its float32 one where weights come from memory, and loses where they lie in its caches or the processor
lacks the instructions: so it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from specserve.config import AutoQuantization, EngineConfig, Quantization
from specserve.core.errors import InvalidRequestError
from specserve.device import has_fp8
from specserve.layers.storages import STORAGES

ROWS = (1, 8)  # of a draft's decode steps
RUNS = 3
MOST_OUTPUTS = 4096  # of the product that is measured: enough for its weights to come from memory
CACHED_BYTES = 8 << 20  # of float32: a product of less is not measured, its weights may lie in the caches
WORTHWHILE = 0.8  # int8 must take at most this share of float32's time

Clock = Callable[[], float]


def check_quantization(config: EngineConfig, device: torch.device) -> None:
    """What is asked for by name must be possible; "auto" always is. Raises InvalidRequestError."""
    if config.draft_model is None and config.draft_quantization in ("fp8", "int8"):
        raise InvalidRequestError(
            f"--draft-quantization {config.draft_quantization} needs --draft-model.", param="draft_quantization"
        )
    for param, asked in (("quantization", config.quantization), ("draft_quantization", config.draft_quantization)):
        if asked == "fp8" and device.type != "cpu" and not has_fp8(device):
            raise InvalidRequestError(
                f"--{param.replace('_', '-')} fp8 needs a GPU of compute capability 8.9 or later; int8 runs on any.",
                param=param,
            )


def resolve_quantization(
    asked: AutoQuantization, config: Any, dtype: torch.dtype, device: torch.device
) -> Quantization:
    """The quantisation asked for; for "auto", the one chosen for a model of that config."""
    if asked != "auto":
        return asked
    inputs, outputs = config.hidden_size, min(2 * config.intermediate_size, MOST_OUTPUTS)
    if device.type != "cpu" or dtype != torch.float32 or 4 * inputs * outputs < CACHED_BYTES:
        return "none"
    return "int8" if int8_share(inputs, outputs) <= WORTHWHILE else "none"


@torch.inference_mode()
def int8_share(inputs: int, outputs: int, clock: Clock = time.perf_counter) -> float:
    """Time of int8 products of a draft's decode steps, as a share of float32's, on this CPU as it is now."""
    seconds = {"none": 0.0, "int8": 0.0}
    own = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    weight = torch.randn(outputs, inputs, generator=own)
    for name in seconds:
        storage = STORAGES[name](inputs, (outputs,), bias=False, dtype=torch.float32, device=weight.device)
        storage.parameters()[0]["weight"].load(weight)
        for rows in ROWS:
            x = torch.randn(rows, inputs, generator=own)
            storage.matmul(x)
            seconds[name] += min(_seconds(lambda s=storage, x=x: s.matmul(x), clock) for _ in range(RUNS))  # type: ignore[misc]
    return seconds["int8"] / seconds["none"]


def _seconds(work: Callable[[], object], clock: Clock) -> float:
    begin = clock()
    work()
    return clock() - begin
