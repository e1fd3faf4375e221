"""How large the KV cache may be: what a GPU has left after the heaviest step was tried, or what the settings say. And
what is said where something does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specserve.config import EngineConfig
from specserve.core.errors import InvalidRequestError
from specserve.device import free_memory, peak_memory
from specserve.runtime.graphs import output_bytes
from specserve.runtime.model_state import kv_bytes_per_block
from specserve.runtime.runner import ModelRunner
from specserve.runtime.step_graphs import Sizes

_CPU_IS_FULL = "can't allocate memory"  # torch has no type of its own for it


@contextmanager
def room_for(what: str, remedy: str, param: str) -> Iterator[None]:
    """What is allocated inside: if it does not fit, InvalidRequestError says so, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and _CPU_IS_FULL not in str(error):
            raise
        raise InvalidRequestError(f"There is not enough memory for {what}: {remedy}.", param=param) from error


def allocate_kv_caches(
    config: EngineConfig, runner: ModelRunner, max_model_len: int, max_num_batched_tokens: int
) -> int:
    """Give all models their KV caches; returns the number of blocks, block 0 included."""
    per_sequence = -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks
    if num_blocks is None:
        per_block = sum(kv_bytes_per_block(state.model.spec, config.block_size) for state in runner.states)
        tokens = max_num_batched_tokens
        with room_for(f"a step of {tokens} tokens", "lower --max-num-batched-tokens", "max_num_batched_tokens"):
            budget = _budget(config, runner, max_model_len, tokens)
        num_blocks = min(budget // per_block, per_sequence * config.max_num_seqs + 1)
    if num_blocks < per_sequence + 1:
        raise InvalidRequestError(
            f"The KV cache has {num_blocks} blocks of {config.block_size} tokens, but one sequence of --max-model-len "
            f"{max_model_len} needs {per_sequence + 1}: lower --max-model-len or give the cache more memory.",
            param="num_blocks" if config.num_blocks is not None else "max_model_len",
        )
    with room_for(f"{num_blocks} KV blocks", "give fewer --num-blocks, or none", "num_blocks"):
        for state in runner.states:
            state.allocate(num_blocks)
    return num_blocks


def _budget(config: EngineConfig, runner: ModelRunner, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Bytes for the KV caches. On a GPU: what `gpu_memory_utilization` leaves beside the weights, the heaviest step,
    and the graphs."""
    if runner.device.type == "cpu":
        return config.kv_cache_bytes
    for state in runner.states:
        state.allocate(1)  # all tokens of the trial go to block 0
    length = min(max_num_batched_tokens, max_model_len)
    rows, with_adapters = max_num_batched_tokens // length, config.max_loras > 0
    heaviest = peak_memory(runner.device, lambda: runner.trial_step(rows, length, with_adapters=with_adapters))
    graphs = 0 if config.enforce_eager else _graph_bytes(config, runner, max_model_len, max_num_batched_tokens)
    return max(0, free_memory(runner.device, config.gpu_memory_utilization) - heaviest - graphs)


def _graph_bytes(config: EngineConfig, runner: ModelRunner, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Bytes that graphs keep for themselves: what the largest of them works in, as they share it, and the logits of
    each decode step."""
    with_adapters, rows = config.max_loras > 0, config.max_num_seqs
    spec = runner.target.model.spec
    decode = peak_memory(runner.device, lambda: runner.trial_step(rows, 1))
    ragged = peak_memory(
        runner.device,
        lambda: runner.trial_graph(Sizes(rows, max_num_batched_tokens, max_model_len), with_adapters=with_adapters),
    )
    logits = output_bytes(rows, spec.vocab_size * spec.dtype.itemsize, with_adapters=with_adapters)
    return max(decode, ragged) + logits
