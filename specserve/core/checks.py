"""Checks that the client makes before a request is queued and the engine makes of whoever speaks to it directly."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specserve.core.errors import InvalidRequestError
from specserve.core.messages import LoraRef

MAX_WEIGHT = 1000.0


def check_tokens(prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int) -> None:
    """There is a prompt, and it and what it is resumed from hold tokens of the vocabulary."""
    if not prompt_ids:
        raise InvalidRequestError("The prompt is empty: it must give at least one token.", param="prompt")
    for field, ids in (("prompt", prompt_ids), ("output_ids", output_ids)):
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequestError(f"{field} holds token {bad}; the vocabulary has {vocab_size}.", param=field)


def check_sum(lora: Sequence[LoraRef], max_adapters: int) -> None:
    """Not too many adapters are summed, and their scales are finite."""
    if len(lora) > max_adapters:
        raise InvalidRequestError(
            f"lora names {len(lora)} adapters; at most {max_adapters} may be summed.", param="lora"
        )
    for ref in lora:
        if not math.isfinite(ref.scale):
            raise InvalidRequestError(f"The scale of adapter {ref.name!r} must be finite.", param="lora")


def check_weight(weight: float) -> None:
    """An adapter's share of tokens beside others' is a positive number of some size."""
    if not 0.0 < weight <= MAX_WEIGHT:  # NaN is neither
        raise InvalidRequestError(
            f"An adapter's weight must be above 0 and at most {MAX_WEIGHT:g}, got {weight!r}.", param="weight"
        )
