"""Log-probabilities of a step's tokens: asked for on the device, plain data on the host."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specserve.core.messages import TokenLogprobs
from specserve.sampling.logprobs import Logprobs


def token_logprobs(tokens: Tensor, found: Logprobs, top: Sequence[int]) -> list[list[TokenLogprobs]]:
    """For tokens [N, K+1] and what `sampling.logprobs` found of them, on the host: per row one entry a token, each with
    its row's `top` likeliest tokens."""
    values, top_values, top_tokens = found.chosen.tolist(), found.top_values.tolist(), found.top_tokens.tolist()
    rows = []
    for row, own in enumerate(tokens.tolist()):
        tops = [
            list(zip(ids, numbers, strict=True))[: top[row]]
            for ids, numbers in zip(top_tokens[row], top_values[row], strict=True)
        ]
        rows.append([TokenLogprobs(*entry) for entry in zip(own, values[row], tops, strict=True)])
    return rows
