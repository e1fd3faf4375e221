"""Which tokens each row has seen and how often, from the token history on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """output [B, V] float: how often the row generated a token; prompt [B, V] bool: whether its prompt holds it."""

    output: Tensor
    prompt: Tensor


def token_counts(
    history: Tensor, lengths: Tensor, prompt_lens: Tensor, vocab_size: int, dtype: torch.dtype = torch.float32
) -> TokenCounts:
    """Count the tokens of each row.

    history [B, L] int64: prompt, then output, then anything; lengths, prompt_lens [B] int64: known tokens, and how many
    of them are the prompt. A length may exceed L only if the caller knows better.
    """
    index = torch.arange(history.shape[1], device=history.device)  # [L]
    known = index < lengths[:, None]  # [B, L]
    is_prompt = index < prompt_lens[:, None]
    tokens = history.clamp(0, vocab_size - 1)  # past the length may stand no token id
    zeros = torch.zeros(history.shape[0], vocab_size, dtype=dtype, device=history.device)
    output = zeros.scatter_add(1, tokens, (known & ~is_prompt).to(dtype))
    return TokenCounts(output, zeros.scatter_add_(1, tokens, (known & is_prompt).to(dtype)) > 0)


def output_counts_at(counts: TokenCounts, drafts: Tensor, num_positions: int) -> Tensor:
    """Output counts that each position sees: the generated tokens and the drafts before it.

    drafts [B, D] int64 (past a row's count: anything); the positions are the last Q of D + 1. Returns [B, Q or 1, V].
    """
    output = counts.output.unsqueeze(1)
    if drafts.shape[1] == 0:
        return output
    batch, num_drafts = drafts.shape
    vocab_size = output.shape[2]
    drawn = output.new_zeros(batch, num_drafts + 1, vocab_size)
    drawn[:, 1:].scatter_(2, drafts.clamp(0, vocab_size - 1).unsqueeze(-1), 1.0)
    return drawn.cumsum(1)[:, -num_positions:] + output
