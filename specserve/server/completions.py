"""POST /v1/completions."""

from __future__ import annotations

from typing import cast

from aiohttp import web

from specserve.core.errors import InvalidRequestError
from specserve.engine.client.async_engine import Prompt
from specserve.engine.client.tokenizer import Tokenizer
from specserve.server.answer import Answer, Dialect
from specserve.server.errors import read_body
from specserve.server.logprobs import completion_logprobs
from specserve.server.protocol import DEFAULT_COMPLETION_TOKENS, CompletionBody, check_body, sampling_params
from specserve.server.selection import select_lora
from specserve.server.state import STATE
from specserve.server.streaming import respond


async def completions(request: web.Request) -> web.StreamResponse:
    """Text from a prompt or several: strings or token ids."""
    state = request.app[STATE]
    body = await read_body(request, CompletionBody)
    check_body(body)
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    generation = await state.engine.submit(
        prompts_of(body.prompt),
        sampling_params(body, max_tokens=max_tokens, logprobs=body.logprobs),
        lora=select_lora(body.model, body.lora, base_names=state.model_names, adapters=state.engine.adapters),
        output_ids=body.output_ids or (),
        cache_salt=body.cache_salt or "",
    )
    answer = Answer.of(body, _dialect(state.engine.tokenizer), state.model_names[0])
    return await respond(request, generation, answer, bool(body.stream))


def prompts_of(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """OpenAI's four shapes of `prompt` as a list of prompts; raises InvalidRequestError for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if kinds in ({str}, {list}):
        return cast(list[Prompt], prompt)
    raise InvalidRequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of these; not empty, not mixed.",
        param="prompt",
    )


def _dialect(tokenizer: Tokenizer) -> Dialect:
    return Dialect(
        id_prefix="cmpl-",
        whole_object="text_completion",
        chunk_object="text_completion",
        whole_content=lambda delta: {"text": delta.text},
        chunk_content=lambda delta, first: {"text": delta.text},
        logprobs=lambda delta: completion_logprobs(tokenizer, delta),
    )
