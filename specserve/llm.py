"""LLM: tokenizer, detokenizer and EngineCore in one process, for scripts, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from msgspec.structs import replace
from transformers import AutoTokenizer

from specserve.config import EngineConfig, environment_seed
from specserve.core.errors import BY_CODE, InvalidRequestError, SpecserveError
from specserve.core.messages import (
    AddRequest,
    FinishReason,
    LoadAdapter,
    LoraRef,
    RequestOutput,
    SpeculationStats,
    TokenLogprobs,
    UnloadAdapter,
)  # fmt: skip
from specserve.core.sampling_params import SamplingParams
from specserve.core.seeds import derive_seed
from specserve.engine.core.build import demo_config
from specserve.engine.core.core import EngineCore
from specserve.speculation.proposer import Proposer

Prompt = str | Sequence[int]
Lora = str | LoraRef | tuple[str, float] | Sequence[LoraRef] | None


@dataclass(slots=True)
class Output:
    """One finished sequence. `text` is "" when the model has no tokenizer; stop strings are cut off."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)


def lora_refs(lora: Lora) -> tuple[LoraRef, ...]:
    """ "sql" | LoraRef | ("sql", 0.5) | a list of LoraRef | None → a tuple of LoraRef."""
    if lora is None:
        return ()
    if isinstance(lora, str):
        return (LoraRef(lora),)
    if isinstance(lora, LoraRef):
        return (lora,)
    if isinstance(lora, tuple) and len(lora) == 2 and isinstance(lora[0], str):
        return (LoraRef(lora[0], float(lora[1])),)
    return tuple(lora)


class LLM:
    """`LLM(model=..., draft_model=..., loras=(("sql", path),))` or `LLM(config)`."""

    def __init__(
        self, config: EngineConfig | None = None, *, proposers: Sequence[Proposer] = (), **fields: Any
    ) -> None:
        self.config = demo_config(config or EngineConfig(**fields))
        self.engine = EngineCore(self.config, proposers)
        self.tokenizer = load_tokenizer(self.config.model)
        self._ids = count()

    def load_adapter(self, name: str, path: str, *, replace: bool = False, pinned: bool = False) -> None:
        """Read an adapter folder and make it available under `name`; raises AdapterError."""
        call_id = next(self._ids)
        call = LoadAdapter(call_id=call_id, name=name, path=path, replace=replace, pinned=pinned)
        reply = self.engine.handle(call)
        while reply is None:
            reply = next((r for r in self.engine.poll_replies() if r.call_id == call_id), None)
        if reply.error is not None:
            raise BY_CODE.get(reply.error.code, SpecserveError)(reply.error.message, param=reply.error.param)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; raises NotFoundError."""
        reply = self.engine.handle(UnloadAdapter(call_id=next(self._ids), name=name))
        assert reply is not None
        if reply.error is not None:
            raise BY_CODE.get(reply.error.code, SpecserveError)(reply.error.message, param=reply.error.param)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora: Lora | Sequence[Lora] = None,
    ) -> list[Output]:
        """Generate for all prompts in one batch. `params` and `lora` (as a list) may differ per prompt; n > 1 gives n
        outputs in a row for a prompt."""
        many: Sequence[Prompt] = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else prompts  # type: ignore[list-item,assignment]
        all_params = [params or SamplingParams()] * len(many) if not isinstance(params, Sequence) else params
        loras = lora if isinstance(lora, list) else [lora] * len(many)
        outputs: dict[str, Output] = {}
        for prompt, own, refs in zip(many, all_params, loras, strict=True):
            for request in self._requests(prompt, own, lora_refs(refs)):
                outputs[request.request_id] = Output(request.request_id)
                self.engine.add_request(request)
        self._run(outputs)
        for output, own in zip(outputs.values(), (p for p in all_params for _ in range(p.n)), strict=True):
            self._finish_text(output, own)
        return list(outputs.values())

    def _requests(self, prompt: Prompt, params: SamplingParams, lora: tuple[LoraRef, ...]) -> list[AddRequest]:
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        seed = environment_seed() if params.seed is None else params.seed
        return [
            AddRequest(
                request_id=f"llm-{next(self._ids)}",
                prompt_ids=ids,
                params=replace(params, n=1),
                seed=derive_seed(seed, index),
                lora=lora,
            )
            for index in range(params.n)
        ]

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise InvalidRequestError("The model has no tokenizer: give prompts as token ids.", param="prompt")
        return list(self.tokenizer.encode(text))

    def _run(self, outputs: dict[str, Output]) -> None:
        while self.engine.has_work():
            self.engine.poll_replies()
            for part in self.engine.step():
                if part.request_id in outputs:
                    self._merge(outputs[part.request_id], part)

    def _merge(self, output: Output, part: RequestOutput) -> None:
        if part.error is not None:
            raise BY_CODE.get(part.error.code, SpecserveError)(part.error.message, param=part.error.param)
        output.token_ids += part.token_ids
        output.cached_tokens = part.cached_tokens
        if part.logprobs is not None:
            output.logprobs = (output.logprobs or []) + part.logprobs
        if part.finish_reason is not None:
            output.finish_reason = part.finish_reason
            output.stop_token_id = part.stop_token_id
            output.speculation = part.speculation or output.speculation

    def _finish_text(self, output: Output, params: SamplingParams) -> None:
        if self.tokenizer is None:
            return
        output.text = self.tokenizer.decode(output.token_ids, skip_special_tokens=True)
        found = [at for stop in params.stop if (at := output.text.find(stop)) >= 0]
        if found:
            output.text, output.finish_reason = output.text[: min(found)], "stop"


def _is_ids(prompts: object) -> bool:
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer, or None if it has none (prompts are token ids then)."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return None
