"""What a server should have done before requests come: steps beyond the captured graphs, run once.

A kernel is compiled when it is first launched, which takes a second or more; whoever waits for a token then would wait
for that. Graphs launch all that small steps need when they are captured. Larger steps are launched one kernel at a
time, and which ones depends on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from specserve.device import upload
from specserve.runtime.layout import StepLayout
from specserve.runtime.model_state import ModelState
from specserve.runtime.ragged_graphs import MAX_TOKENS
from specserve.runtime.rows import DeviceRows
from specserve_adapters.pool import AdapterWork

_DECODES = 32  # of a step that has prompts too


@torch.inference_mode()
def warm_up(
    states: Iterable[ModelState], rows: DeviceRows, *, max_tokens: int, max_context: int, with_adapters: bool
) -> None:
    """Forward steps of more than MAX_TOKENS tokens, decodes and prompts together, through each model, without and with
    adapters. All of it is the padding row's, and written to block 0."""
    kinds = list(AdapterWork) if with_adapters else [AdapterWork.NONE]
    for state in states:
        for tokens in step_sizes(max_tokens):
            lens = sequence_lens(tokens, max_context)
            layout = _layout(rows, lens)
            for work in kinds:
                state.forward(rows, layout, None, lens, work=work)


def step_sizes(max_tokens: int) -> Iterator[int]:
    """Numbers of tokens whose kernels differ, as far as eager steps have so many: each is twice the one before."""
    tokens = MAX_TOKENS + MAX_TOKENS // 16
    while tokens < max_tokens:
        yield tokens
        tokens *= 2
    if max_tokens > MAX_TOKENS:
        yield max_tokens


def sequence_lens(tokens: int, max_context: int) -> tuple[int, ...]:
    """Decodes, then prompts of at most `max_context` tokens, `tokens` in all."""
    decodes = min(_DECODES, tokens // 2)
    whole, rest = divmod(tokens - decodes, max_context)
    return (1,) * decodes + (max_context,) * whole + ((rest,) if rest else ())


def _layout(rows: DeviceRows, lens: Sequence[int]) -> StepLayout:
    """Sequences of the padding row, each from position 0 on."""
    device = rows.num_tokens.device
    start = np.concatenate(([0], np.cumsum(lens)))
    within = np.arange(start[-1]) - np.repeat(start[:-1], lens)
    row_index, token_rows = (np.full(count, rows.padding_row) for count in (len(lens), start[-1]))
    arrays = (row_index, start, token_rows, within)
    index, starts, of_tokens, positions = (upload(array.astype(np.int64), device) for array in arrays)
    return StepLayout((rows.padding_row,) * len(lens), tuple(lens), index, starts, of_tokens, positions)
