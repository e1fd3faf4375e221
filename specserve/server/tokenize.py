"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from specserve.core.errors import InvalidRequestError
from specserve.server.chat import encode_chat
from specserve.server.errors import json_response, read_body
from specserve.server.protocol import Message
from specserve.server.selection import select_lora
from specserve.server.state import STATE, ServerState


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None  # default: yes for a prompt; a template writes its own
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


async def tokenize(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = await read_body(request, TokenizeBody)
    _check_model(state, body.model)
    tokens = await _encode(state, body)
    tokenizer = state.engine.tokenizer
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": state.engine.ready.max_model_len,
            "tokens": tokens,
            "token_strs": [tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None,
        }
    )


async def detokenize(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = await read_body(request, DetokenizeBody)
    _check_model(state, body.model)
    vocab_size = state.engine.ready.vocab_size
    for token in body.tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"tokens holds {token}; the vocabulary has {vocab_size}.", param="tokens")
    return json_response({"prompt": state.engine.tokenizer.decode(body.tokens, skip_special_tokens=False)})


def _check_model(state: ServerState, model: str | None) -> None:
    select_lora(model, None, base_names=state.model_names, adapters=state.engine.adapters)


async def _encode(state: ServerState, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Give either prompt or messages.", param="prompt")
    if body.messages is None:
        assert body.prompt is not None
        return await state.engine.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    return await encode_chat(
        state.engine,
        body.messages,
        add_generation_prompt=body.add_generation_prompt,
        template_args=body.chat_template_kwargs,
        add_special_tokens=bool(body.add_special_tokens),
    )
