"""ScriptedCore: an engine core without a model, whose answers are known beforehand.

Greedy requests echo their prompt, over and over; sampled ones shift it by their seed. A step gives each request 1 to 3
tokens. SCRIPTED_STEP_SECONDS in the environment slows steps down, where a test must act while a stream runs.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from specserve.config import EngineConfig
from specserve.core.errors import AdapterError, ModelLoadError, NotFoundError
from specserve.core.messages import (
    AdapterInfo,
    AdapterTierStats,
    AddRequest,
    EngineStats,
    ErrorInfo,
    ListAdapters,
    LoadAdapter,
    PinAdapter,
    Ready,
    Reply,
    RequestOutput,
    SpeculationStats,
    TokenLogprobs,
    UnloadAdapter,
)

VOCAB = 300
FIRST_PLAIN = 5  # below are special tokens
CRASH = [7, 7, 7]  # a prompt that is an unexpected error
FAILING_ADAPTER = "failing"  # loads, but fails the requests that use it


def scripted_token(request: AddRequest, position: int) -> int:
    """The token that `request` gives at output position `position`."""
    token = request.prompt_ids[position % len(request.prompt_ids)]
    if request.params.greedy:
        return token
    return FIRST_PLAIN + (token + 31 * request.seed + 7 * position) % (VOCAB - FIRST_PLAIN)


@dataclass
class Running:
    request: AddRequest
    done: int
    stats: SpeculationStats = field(default_factory=SpeculationStats)


class ScriptedCore:
    """See the module."""

    def __init__(self, config: EngineConfig) -> None:
        if not Path(config.model).is_dir():
            raise ModelLoadError(f"The model {config.model!r} cannot be read.")
        self.ready = Ready(
            model=config.model,
            vocab_size=VOCAB,
            max_model_len=config.max_model_len or 512,
            eos_token_ids=[1],
            proposers=["draft_model", "ngram"],
            num_blocks=100,
            device="none",
            dtype="none",
            quantization="fp8",
            draft_quantization="none",
        )
        self._pause = float(os.environ.get("SCRIPTED_STEP_SECONDS", "0"))
        self._running: dict[str, Running] = {}
        self._adapters: dict[str, AdapterInfo] = {}
        self._told: dict[str, AdapterInfo] = {}  # as the last statistics had them
        self._replies: list[Reply] = []
        self._steps = 0
        self._tokens = 0
        for name, path in config.loras:
            self._register(LoadAdapter(call_id=0, name=name, path=path))

    def add_request(self, request: AddRequest) -> None:
        for ref in request.lora:
            if ref.name not in self._adapters:
                raise NotFoundError(f"The adapter {ref.name!r} does not exist.", param="lora")
            self._adapters[ref.name].requests += 1
        self._running[request.request_id] = Running(request, len(request.output_ids))

    def abort_requests(self, ids: list[str]) -> None:
        for request_id in ids:
            self._running.pop(request_id, None)

    def handle(self, call: LoadAdapter | UnloadAdapter | PinAdapter | ListAdapters) -> Reply | None:
        if isinstance(call, LoadAdapter):
            self._replies.append(self._load(call))
            return None
        if isinstance(call, ListAdapters):
            infos = [info for info in self._adapters.values() if call.name in (None, info.name)]
            return Reply(call_id=call.call_id, adapters=infos)
        if call.name not in self._adapters:
            raise NotFoundError(f"The adapter {call.name!r} does not exist.", param="name")
        if isinstance(call, UnloadAdapter):
            del self._adapters[call.name]
            return Reply(call_id=call.call_id)
        self._adapters[call.name].pinned = call.pinned
        return Reply(call_id=call.call_id, adapters=[self._adapters[call.name]])

    def poll_replies(self) -> list[Reply]:
        replies, self._replies = self._replies, []
        return replies

    def has_work(self) -> bool:
        return bool(self._running or self._replies)

    def step(self) -> list[RequestOutput]:
        time.sleep(self._pause)
        self._steps += 1
        return [self._advance(entry) for entry in list(self._running.values())]

    def stats(self) -> EngineStats:
        changed = [info for name, info in self._adapters.items() if self._told.get(name) != info]
        removed = [name for name in self._told if name not in self._adapters]
        self._told = {name: replace(info) for name, info in self._adapters.items()}
        return EngineStats(
            num_running=len(self._running),
            num_blocks=100,
            num_free_blocks=100 - len(self._running),
            steps=self._steps,
            generation_tokens=self._tokens,
            drafted_per_pos=[5, 2],
            accepted_per_pos=[3, 1],
            draft_length=1.5,
            step_cost_ratio=1.25,
            probed_rows=7,
            probe_seconds=0.5,
            adapters=changed,
            removed_adapters=removed,
            adapter_tiers=AdapterTierStats(host_bytes=1000 * len(self._adapters), max_host_bytes=10**6, slots=8),
        )

    def close(self) -> None:
        self._running.clear()

    def _advance(self, entry: Running) -> RequestOutput:
        request = entry.request
        assert request.params.max_tokens is not None
        if any(ref.name == FAILING_ADAPTER for ref in request.lora):
            del self._running[request.request_id]
            error = ErrorInfo("invalid_adapter", "The adapter 'failing' holds NaN in lora_A.", "lora")
            return RequestOutput(request_id=request.request_id, finish_reason="error", error=error)
        if request.prompt_ids == CRASH:
            raise RuntimeError("scripted crash")
        count = min(1 + entry.done % 3, request.params.max_tokens - entry.done)
        tokens = [scripted_token(request, entry.done + index) for index in range(count)]
        entry.done += count
        self._tokens += count
        entry.stats.rounds += 1
        entry.stats.drafted += 2
        entry.stats.accepted += count - 1
        entry.stats.drafted_per_position = [entry.stats.rounds] * 2
        before = entry.stats.accepted_per_position or [0, 0]
        entry.stats.accepted_per_position = [before[0] + (count > 1), before[1] + (count > 2)]
        output = RequestOutput(request_id=request.request_id, token_ids=tokens, cached_tokens=4, queue_seconds=0.0)
        if request.params.logprobs is not None:
            output.logprobs = [scripted_logprobs(token, request.params.logprobs) for token in tokens]
        if entry.done >= request.params.max_tokens:
            output.finish_reason = "length"
            output.speculation = entry.stats
            del self._running[request.request_id]
        return output

    def _load(self, call: LoadAdapter) -> Reply:
        if not Path(call.path).is_dir():
            error = ErrorInfo("invalid_adapter", f"{call.path} is no folder.", "path")
            return Reply(call_id=call.call_id, error=error)
        self._register(call)
        return Reply(call_id=call.call_id, adapters=[self._adapters[call.name]])

    def _register(self, call: LoadAdapter) -> None:
        if not Path(call.path).is_dir():
            raise AdapterError(f"The adapter {call.name!r} cannot be read from {call.path}.", param="lora")
        self._adapters[call.name] = AdapterInfo(
            name=call.name,
            path=call.path,
            version=f"v-{call.name}" if call.read else "",
            tier="host" if call.read else "disk",
            rank=4 if call.read else None,
            num_bytes=1000 if call.read else None,
            pinned=call.pinned or (call.name in self._adapters and self._adapters[call.name].pinned),
            weight=call.weight,
            has_draft=call.draft_path is not None if call.read else None,
        )


def scripted_logprobs(token: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, [((token + index) % VOCAB, -0.5 - index) for index in range(top)])
