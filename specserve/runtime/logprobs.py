"""Log-probabilities of a step's tokens as plain data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specserve.core.messages import TokenLogprobs
from specserve.sampling.logprobs import logprobs


def token_logprobs(logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> list[list[TokenLogprobs]]:
    """For raw logits [S, K+1, vocab] and tokens [S, K+1]: per row what it asked for (None: an empty list)."""
    rows: list[list[TokenLogprobs]] = [[] for _ in wanted]
    asking = [row for row, count in enumerate(wanted) if count is not None]
    if not asking:
        return rows
    most = max(count for count in wanted if count is not None)
    chosen_tokens = tokens[asking]
    found = logprobs(logits[asking], chosen_tokens, most)
    values, top_values, top_tokens = found.chosen.tolist(), found.top_values.tolist(), found.top_tokens.tolist()
    for index, row in enumerate(asking):
        count = wanted[row]
        for j, token in enumerate(chosen_tokens[index].tolist()):
            top = list(zip(top_tokens[index][j], top_values[index][j], strict=True))[:count]
            rows[row].append(TokenLogprobs(token, values[index][j], top))
    return rows
