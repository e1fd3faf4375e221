"""What can be refused before anything is queued: adapters, proposers, the context's length."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from specserve.core.checks import check_sum
from specserve.core.errors import ContextLengthError, InvalidRequestError, NotFoundError
from specserve.core.messages import LoraRef, Ready
from specserve.core.sampling_params import SamplingParams


def resolve_params(params: SamplingParams, num_prompt: int, num_output: int, ready: Ready) -> SamplingParams:
    """Parameters of one sequence: max_tokens set, n = 1. `max_tokens` counts the `num_output` tokens resumed.

    Raises InvalidRequestError, or ContextLengthError when prompt and max_tokens do not fit the context.
    """
    room = ready.max_model_len - num_prompt
    wanted = num_output + 1 if params.max_tokens is None else params.max_tokens
    if wanted > room:
        asked = (
            "no token can follow" if params.max_tokens is None else f"with {wanted} tokens asked for it does not fit"
        )
        raise ContextLengthError(
            f"The context holds {ready.max_model_len} tokens and the prompt has {num_prompt}: {asked}.",
            param="prompt" if room < 1 or params.max_tokens is None else "max_tokens",
        )
    proposer = params.speculation.proposer
    if proposer is not None and proposer not in ready.proposers:
        raise InvalidRequestError(
            f"speculation.proposer {proposer!r} is unknown; this server has {', '.join(ready.proposers) or 'none'}.",
            param="speculation",
        )
    return msgspec.structs.replace(
        params,
        n=1,
        max_tokens=room if params.max_tokens is None else params.max_tokens,
        # Off; and an integer of any size must not reach a 64-bit field.
        top_k=0 if params.top_k >= ready.vocab_size else params.top_k,
    )


def check_lora(lora: Sequence[LoraRef], known: Container[str], max_adapters: int) -> None:
    """Every adapter is registered, named once, and there are not too many."""
    check_sum(lora, max_adapters)
    names = [ref.name for ref in lora]
    for name in names:
        if name not in known:
            raise NotFoundError(f"The adapter {name!r} does not exist; load it first.", param="lora")
        if names.count(name) > 1:
            raise InvalidRequestError(f"lora names the adapter {name!r} more than once.", param="lora")
