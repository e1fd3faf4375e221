"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from specserve.core.errors import InvalidRequestError
from specserve.core.sampling_params import MAX_LOGPROBS
from specserve.engine.client.async_engine import AsyncEngine
from specserve.engine.client.tokenizer import Tokenizer
from specserve.server.answer import Answer, Dialect
from specserve.server.errors import read_body
from specserve.server.logprobs import chat_logprobs
from specserve.server.protocol import ChatBody, Message, check_body, refuse_unsupported, sampling_params
from specserve.server.selection import select_lora
from specserve.server.state import STATE
from specserve.server.streaming import respond

_ROLE = {"role": "assistant"}


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The assistant's next turn, in the model's own chat template."""
    state = request.app[STATE]
    body = await read_body(request, ChatBody)
    check_body(body)
    lora = select_lora(body.model, body.lora, base_names=state.model_names, adapters=state.engine.adapters)
    params = sampling_params(body, max_tokens=_max_tokens(body), logprobs=_num_logprobs(body))
    prompt_ids = await encode_chat(
        state.engine,
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_args=body.chat_template_kwargs or {},
    )
    generation = await state.engine.submit(
        [prompt_ids], params, lora=lora, output_ids=body.output_ids or (), cache_salt=body.cache_salt or ""
    )
    answer = Answer.of(body, _dialect(state.engine.tokenizer), state.model_names[0])
    return await respond(request, generation, answer, bool(body.stream))


def _dialect(tokenizer: Tokenizer) -> Dialect:
    return Dialect(
        id_prefix="chatcmpl-",
        whole_object="chat.completion",
        chunk_object="chat.completion.chunk",
        whole_content=lambda delta: {"message": {"role": "assistant", "content": delta.text, "refusal": None}},
        chunk_content=lambda delta, first: {
            "delta": _ROLE | {"content": delta.text} if first else {"content": delta.text}
        },
        logprobs=lambda delta: chat_logprobs(tokenizer, delta),
    )


async def encode_chat(
    engine: AsyncEngine,
    messages: list[Message],
    *,
    add_generation_prompt: bool,
    template_args: dict[str, Any],
    add_special_tokens: bool = False,
) -> list[int]:
    """Token ids of a conversation; the template writes the special tokens itself."""
    if not messages:
        raise InvalidRequestError("messages must hold at least one message.", param="messages")
    turns = [_turn(message, f"messages[{index}].") for index, message in enumerate(messages)]
    text = engine.tokenizer.render_chat(turns, add_generation_prompt=add_generation_prompt, template_args=template_args)
    return await engine.encode(text, add_special_tokens=add_special_tokens)


def _turn(message: Message, prefix: str) -> dict[str, str]:
    refuse_unsupported(message, prefix)
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None:
        raise InvalidRequestError(f"{prefix}content is missing.", param=f"{prefix}content")
    turn = {"role": message.role, "content": content}
    return turn | {"name": message.name} if message.name is not None else turn


def _max_tokens(body: ChatBody) -> int | None:
    """max_completion_tokens and its older name; None is what fits."""
    if body.max_completion_tokens is None:
        return body.max_tokens
    if body.max_tokens not in (None, body.max_completion_tokens):
        raise InvalidRequestError("max_tokens and max_completion_tokens disagree.", param="max_tokens")
    if body.max_completion_tokens < 1:
        raise InvalidRequestError("max_completion_tokens must be at least 1.", param="max_completion_tokens")
    return body.max_completion_tokens


def _num_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs = true.", param="top_logprobs")
    if not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}.", param="top_logprobs")
    return body.top_logprobs
