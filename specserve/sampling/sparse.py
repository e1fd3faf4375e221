"""Adding to a few tokens' logits: shared by the processors that touch single tokens."""

from __future__ import annotations

from torch import Tensor

from specserve.sampling.batch import SparseTokens


def add_sparse(logits: Tensor, tokens: SparseTokens, values: Tensor) -> Tensor:
    """logits [B, Q, V] with values [N, Q] or [N, 1] added at (row, every position, token); logits stay as they are."""
    by_token = logits.transpose(1, 2)  # [B, V, Q]
    values = values.expand(-1, logits.shape[1])
    return by_token.index_put((tokens.row, tokens.token), values, accumulate=True).transpose(1, 2)
