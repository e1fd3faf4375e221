"""LLM: tokenizer, detokenizer and EngineCore in one process, for scripts, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from msgspec.structs import replace

from specserve.config import EngineConfig, resolve_paths
from specserve.core.errors import InvalidRequestError, ModelLoadError
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
from specserve.engine.client.bad_words import with_word_tokens
from specserve.engine.client.detokenizer import Detokenizer
from specserve.engine.client.seeds import SeedSource
from specserve.engine.client.tokenizer import Tokenizer
from specserve.engine.core.core import EngineCore
from specserve.speculation.proposer import Proposer

Prompt = str | Sequence[int]
Lora = str | LoraRef | tuple[str, float] | Sequence[LoraRef] | None


@dataclass(slots=True)
class Output:
    """One sequence. `text` is "" when the model has no tokenizer; it ends before a stop string, as the tokens do."""

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


@dataclass(slots=True)
class _Running:
    output: Output
    text: Detokenizer | None


class LLM:
    """`LLM(model=..., draft_model=..., loras=(("sql", path),))` or `LLM(config)`.

    Raises ModelLoadError or InvalidRequestError (a setting). `proposers`: more of them, by name;
    `progress`: show bars on stderr while it starts.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        proposers: Sequence[Proposer] = (),
        progress: bool = False,
        **fields: Any,
    ) -> None:
        self.config = resolve_paths(config or EngineConfig(**fields))
        self.engine = EngineCore(self.config, proposers, progress=progress)
        self.tokenizer = load_tokenizer(self.config.model)
        self._ids = count()
        self._seeds = SeedSource(self.config.seed)

    def close(self) -> None:
        """End the engine's threads; the object must not be used after."""
        self.engine.close()

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        draft_path: str | None = None,
        replace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> None:
        """Read an adapter folder and make it available under `name`, with the companion in its subfolder draft/ or in
        `draft_path`; raises AdapterError."""
        self._call(
            LoadAdapter(
                call_id=next(self._ids), name=name, path=path, draft_path=draft_path, replace=replace, pinned=pinned,
                weight=weight,
            )
        )  # fmt: skip

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; raises NotFoundError."""
        self._call(UnloadAdapter(call_id=next(self._ids), name=name))

    def _call(self, call: LoadAdapter | UnloadAdapter) -> None:
        reply = self.engine.handle(call)
        while reply is None:
            self.engine.adapters.wait(0.1)
            reply = next((r for r in self.engine.poll_replies() if r.call_id == call.call_id), None)
        if reply.error is not None:
            raise reply.error.to_error()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora: Lora | Sequence[Lora] = None,
    ) -> list[Output]:
        """Generate for all prompts in one batch. `params` and `lora` (as a list) may differ per prompt; n > 1 gives n
        outputs in a row for a prompt. Raises the SpecserveError of the first request that is refused or fails."""
        many = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else list(prompts)
        all_params = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
        loras = lora if isinstance(lora, list) else [lora] * len(many)
        for name, values in (("params", all_params), ("lora", loras)):
            if len(values) != len(many):
                raise InvalidRequestError(f"{name} has {len(values)} entries for {len(many)} prompts.", param=name)
        running: dict[str, _Running] = {}
        try:
            for prompt, own, refs in zip(many, all_params, loras, strict=True):
                for request in self._requests(prompt, own, lora_refs(refs)):  # type: ignore[arg-type]
                    running[request.request_id] = self._running(request)
                    self.engine.add_request(request)
            self._run(running)
        finally:
            self.engine.abort_requests(list(running))  # none is left unless something was raised
        return [one.output for one in running.values()]

    def _requests(self, prompt: Prompt, params: SamplingParams, lora: tuple[LoraRef, ...]) -> list[AddRequest]:
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        params = self._with_word_tokens(params)
        seed = self._seeds.next() if params.seed is None else params.seed
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
        return self.tokenizer.encode(text)

    def _with_word_tokens(self, params: SamplingParams) -> SamplingParams:
        if not params.bad_words:
            return params
        if self.tokenizer is None:
            raise InvalidRequestError("The model has no tokenizer: use bad_words_token_ids instead.", param="bad_words")
        return with_word_tokens(params, self.tokenizer, self.engine.built.spec.vocab_size)

    def _running(self, request: AddRequest) -> _Running:
        params = request.params
        if self.tokenizer is None:
            if params.stop:
                raise InvalidRequestError("The model has no tokenizer: use stop_token_ids instead.", param="stop")
            return _Running(Output(request.request_id), None)
        text = Detokenizer(
            self.tokenizer, params.stop, context=request.prompt_ids,
            include_stop=params.include_stop_str_in_output, min_tokens=params.min_tokens, offsets=False,
        )  # fmt: skip
        return _Running(Output(request.request_id), text)

    def _run(self, running: dict[str, _Running]) -> None:
        while self.engine.has_work():
            self.engine.poll_replies()
            for part in self.engine.step():
                if part.request_id not in running:
                    continue  # aborted, when an earlier call raised
                if part.error is not None:
                    raise part.error.to_error()
                self._merge(running[part.request_id], part)

    def _merge(self, one: _Running, part: RequestOutput) -> None:
        output, kept = one.output, len(part.token_ids)
        output.cached_tokens = part.cached_tokens
        output.finish_reason, output.stop_token_id = part.finish_reason, part.stop_token_id
        output.speculation = part.speculation or output.speculation
        if one.text is not None:
            piece = one.text.push(part.token_ids, last=part.finish_reason is not None)
            output.text += piece.text
            if piece.stop is not None:
                kept, output.finish_reason, output.stop_token_id = piece.num_tokens, "stop", None
                self.engine.abort_requests([output.request_id])
        output.token_ids += part.token_ids[:kept]
        if part.logprobs is not None:
            output.logprobs = (output.logprobs or []) + part.logprobs[:kept]


def _is_ids(prompts: object) -> bool:
    return isinstance(prompts, Sequence) and bool(prompts) and isinstance(prompts[0], int)


def load_tokenizer(model: str) -> Tokenizer | None:
    """The model's tokenizer, or None if it has none (prompts are token ids then)."""
    try:
        return Tokenizer.load(model)
    except ModelLoadError:
        return None
