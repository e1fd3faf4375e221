"""Bodies of the generating requests. Unknown fields are refused by name, and so are known ones that do nothing here."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from specserve.core.errors import InvalidRequestError
from specserve.core.messages import LoraRef
from specserve.core.sampling_params import NO_SPECULATION, SamplingParams, SpeculationParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's and vLLM's; a chat takes what fits
NOT_OF_A_BODY = frozenset({"max_tokens", "logprobs", "bad_words_token_ids"})  # found out otherwise


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted: padding against traffic analysis is never added


class GenerateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What /v1/completions and /v1/chat/completions share. null means the default."""

    model: str | None = None
    lora: str | LoraRef | list[str | LoraRef] | None = None
    speculation: bool | SpeculationParams | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    output_ids: list[int] | None = None
    cache_salt: str | None = None

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    # Harmless: they change nothing that is generated.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # vLLM's, for what is always so here.
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None


class CompletionBody(GenerateBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn. The fields that an assistant's answer carries are taken back as long as they are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    annotations: list[Any] | None = None
    audio: Any = None
    tool_call_id: str | None = None


class ChatBody(GenerateBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None


# Known and not supported: accepted only at the values that ask for nothing. null always is.
NO_OPS: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "tool_calls": ([],),
    "tool_call_id": (),
    "annotations": ([],),
}


def refuse_unsupported(body: msgspec.Struct, prefix: str = "") -> None:
    """Raise InvalidRequestError naming the first field that asks for what this server cannot do."""
    for name, allowed in NO_OPS.items():
        value = getattr(body, name, None)
        if value is not None and value not in allowed:
            raise InvalidRequestError(
                f"{prefix}{name} is not supported by this server; leave it out.", param=prefix + name
            )


def check_body(body: GenerateBody) -> None:
    """What the types alone cannot say about a body."""
    refuse_unsupported(body)
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.n or 1):
        raise InvalidRequestError("best_of is not supported by this server; leave it out.", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options may only be given with stream = true.", param="stream_options")


def sampling_params(body: GenerateBody, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """SamplingParams of a body: its own fields by their names, what it leaves out at the defaults."""
    named = (field for field in SamplingParams.__struct_fields__ if field not in NOT_OF_A_BODY)
    given = {name: getattr(body, name) for name in named if getattr(body, name) is not None}
    if isinstance(body.stop, str):
        given["stop"] = (body.stop,)
    for name in ("bad_words", "stop", "stop_token_ids"):
        if name in given:
            given[name] = tuple(given[name])
    given["speculation"] = _speculation(body.speculation)
    return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


def _speculation(value: bool | SpeculationParams | None) -> SpeculationParams:
    if isinstance(value, SpeculationParams):
        return value
    return NO_SPECULATION if value is False else SpeculationParams()
