"""Logits as the kernels of this folder read them: rows and positions at one distance, so that one number tells places.

With two distances a kernel would be compiled for each remainder that the larger, which grows with the number of
positions, may have.
"""

from __future__ import annotations

from torch import Tensor


def evenly_spaced(logits: Tensor) -> tuple[Tensor, int]:
    """logits [B, Q, vocab], a copy where they do not lie so, and how many elements position q of row b is from the
    next: it begins at (b · Q + q) · distance. A distance that nobody needs is the vocabulary's size."""
    num_rows, num_positions, vocab_size = logits.shape
    to_row, to_position = logits.stride(0), logits.stride(1)
    if num_positions == 1:
        return logits, to_row if num_rows > 1 else vocab_size
    if num_rows > 1 and to_row != num_positions * to_position:
        return logits.contiguous(), vocab_size
    return logits, to_position
