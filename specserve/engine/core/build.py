"""From an EngineConfig to models, caches and a runner: everything that is decided once at start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from specserve.config import MAX_DRAFTS, Dtype, EngineConfig, resolve_demo
from specserve.core.errors import InvalidRequestError, ModelLoadError
from specserve.device import free_memory, resolve_device
from specserve.loading import load_model
from specserve.models.spec import ModelSpec
from specserve.runtime.model_state import Model, ModelState, kv_bytes_per_block
from specserve.runtime.rows import DeviceRows
from specserve.runtime.runner import ModelRunner
from specserve.speculation.proposer import Proposer
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.manager import AdapterManager

# Tokens that a step verifies at little more cost than its decode rows alone. On a CPU products of a few tokens are
# already bound by arithmetic: measured with the bundled models, 8 rows of 3 tokens beat 8 of 5 and 8 of 1. On a GPU
# they are bound by the weights' bytes up to a few hundred.
CHEAP_TOKENS = {"cpu": 24, "cuda": 256}


@dataclass(frozen=True, slots=True)
class Resolved:
    """What EngineCore is made of, with every "auto" decided."""

    spec: ModelSpec
    runner: ModelRunner
    adapters: AdapterManager
    proposers: ProposerRegistry
    device: torch.device
    num_blocks: int
    max_model_len: int
    pipeline_depth: int
    default_proposer: str | None
    cheap_tokens: int


def check_draft(target: ModelSpec, draft: ModelSpec) -> None:
    """Hidden sizes may differ; vocabularies may not."""
    if target.vocab_size != draft.vocab_size:
        raise ModelLoadError(
            f"The draft model's vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}: "
            "speculation needs a draft model with the same tokenizer."
        )


def resolve_max_model_len(asked: int | None, specs: list[ModelSpec]) -> int:
    """The models' own context, or the asked one if all of them have it."""
    limit = min(spec.max_model_len for spec in specs)
    if asked is not None and asked > limit:
        raise InvalidRequestError(
            f"--max-model-len {asked} exceeds the {limit} tokens that the models support.", param="max_model_len"
        )
    return asked or limit


def resolve_num_blocks(config: EngineConfig, specs: list[ModelSpec], max_model_len: int, device: torch.device) -> int:
    """Blocks of the KV pool, block 0 included; one sequence of full length must fit."""
    per_sequence = -(-max_model_len // config.block_size)
    num_blocks = config.num_blocks
    if num_blocks is None:
        on_cpu = device.type == "cpu"
        budget = config.kv_cache_bytes if on_cpu else free_memory(device, config.gpu_memory_utilization)
        per_block = sum(kv_bytes_per_block(spec, config.block_size) for spec in specs)
        num_blocks = min(budget // per_block, per_sequence * config.max_num_seqs + 1)
    if num_blocks < per_sequence + 1:
        raise InvalidRequestError(
            f"The KV cache has {num_blocks} blocks of {config.block_size} tokens, but one sequence of --max-model-len "
            f"{max_model_len} needs {per_sequence + 1}: lower --max-model-len or give the cache more memory.",
            param="num_blocks" if config.num_blocks is not None else "max_model_len",
        )
    return num_blocks


def build_engine(config: EngineConfig, extra_proposers: Sequence[Proposer] = ()) -> Resolved:
    """Load the models and allocate everything. Raises ModelLoadError or InvalidRequestError."""
    config.validate()
    config = resolve_demo(config)
    device = usable_device(config.device)
    target = load_model(config.model, dtype=config.dtype, device=device)
    draft = _load_draft(config, target.spec, device)
    models: list[Model] = [target] if draft is None else [target, draft]
    specs = [model.spec for model in models]
    max_model_len = resolve_max_model_len(config.max_model_len, specs)
    num_blocks = resolve_num_blocks(config, specs, max_model_len, device)
    proposers = ProposerRegistry(has_draft_model=draft is not None, extra=extra_proposers)
    adapters = _build_adapters(config, models)
    states = [_state(config, model, num_blocks, device) for model in models]
    rows = DeviceRows(
        config.max_num_seqs, max_model_len, slack=2 * (MAX_DRAFTS + 1), block_size=config.block_size,
        vocab_size=target.spec.vocab_size, max_adapters=config.max_adapters_per_request, device=device,
        dtype=torch.float64 if target.spec.dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    runner = ModelRunner(states[0], states[1] if draft else None, rows, proposers, adapters.host, device)
    return Resolved(
        spec=target.spec, runner=runner, adapters=adapters, proposers=proposers, device=device, num_blocks=num_blocks,
        max_model_len=max_model_len, pipeline_depth=config.pipeline_depth or (1 if device.type == "cpu" else 2),
        default_proposer=default_proposer(config, proposers),
        cheap_tokens=CHEAP_TOKENS.get(device.type, CHEAP_TOKENS["cuda"]),
    )  # fmt: skip


def usable_device(name: str) -> torch.device:
    """The device of that name, tried with an allocation."""
    try:
        device = resolve_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the device's support
        reason = str(error).splitlines()[0]
        raise InvalidRequestError(f"--device {name!r} cannot be used: {reason}", param="device") from error
    return device


def default_proposer(config: EngineConfig, proposers: ProposerRegistry) -> str | None:
    """Who drafts for requests that name nobody: the proposer that was set, else the draft model if there is one."""
    if config.proposer is None:
        return "draft_model" if config.draft_model is not None else None
    if config.proposer not in proposers.names:
        hint = "; draft_model needs --draft-model" if config.proposer == "draft_model" else ""
        raise InvalidRequestError(
            f"--proposer {config.proposer!r} is not available; choose from {', '.join(proposers.names)}{hint}.",
            param="proposer",
        )
    return config.proposer


def _load_draft(config: EngineConfig, target: ModelSpec, device: torch.device) -> Model | None:
    if config.draft_model is None:
        return None
    draft = load_model(config.draft_model, dtype=dtype_name(target.dtype), device=device)
    check_draft(target, draft.spec)
    return draft


def _build_adapters(config: EngineConfig, models: list[Model]) -> AdapterManager:
    specs = [[linear.spec for linear in model.linears] for model in models]
    manager = AdapterManager(
        specs[0], specs[1] if len(specs) > 1 else None, num_slots=config.max_loras, max_rank=config.max_lora_rank,
        max_host_bytes=config.max_host_lora_bytes, dtype=models[0].spec.dtype, draft_dtype=models[-1].spec.dtype,
        pin_memory=resolve_device(config.device).type == "cuda",
    )  # fmt: skip
    for name, path in config.loras:
        manager.register(name, path)
    return manager


def _state(config: EngineConfig, model: Model, num_blocks: int, device: torch.device) -> ModelState:
    return ModelState(
        model, num_blocks=num_blocks, block_size=config.block_size, adapter_slots=config.max_loras,
        max_rank=config.max_lora_rank, device=device,
    )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> Dtype:
    """torch.float32 → "float32"."""
    name = str(dtype).removeprefix("torch.")
    assert name in ("float32", "bfloat16", "float16", "float64")
    return cast(Dtype, name)
