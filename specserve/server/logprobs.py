"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from typing import Any, Final

from specserve.core.messages import TokenLogprobs
from specserve.engine.client.sequence import Delta
from specserve.engine.client.tokenizer import Tokenizer

# What OpenAI's API and vLLM write for a probability of 0, since JSON has no infinity.
LOWEST: Final = -9999.0


def completion_logprobs(tokenizer: Tokenizer, delta: Delta) -> dict[str, Any] | None:
    """/v1/completions: parallel lists; `text_offset` counts characters into this response's text."""
    if delta.logprobs is None:
        return None
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in delta.logprobs],
        "token_logprobs": [max(entry.logprob, LOWEST) for entry in delta.logprobs],
        "top_logprobs": [_top(tokenizer, entry) for entry in delta.logprobs],
        "text_offset": delta.offsets,
    }


def _top(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    """The alternatives and, as in OpenAI's API, the chosen token, also where it is none of the top."""
    top = {tokenizer.token_text(token): max(logprob, LOWEST) for token, logprob in entry.top}
    top.setdefault(tokenizer.token_text(entry.token_id), max(entry.logprob, LOWEST))
    return top


def chat_logprobs(tokenizer: Tokenizer, delta: Delta) -> dict[str, Any] | None:
    """/v1/chat/completions: one object a token."""
    if delta.logprobs is None:
        return None
    content = [
        {
            **_token(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_token(tokenizer, token, logprob) for token, logprob in entry.top],
        }
        for entry in delta.logprobs
    ]
    return {"content": content, "refusal": None}


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
