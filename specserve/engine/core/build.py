"""From an EngineConfig to models, caches and a runner: everything that is decided once at start."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch

from specserve.config import MAX_DRAFTS, Dtype, EngineConfig, host_lora_bytes, resolve_paths
from specserve.core.errors import InvalidRequestError, ModelLoadError
from specserve.device import resolve_device
from specserve.engine.core.memory import allocate_kv_caches, room_for
from specserve.loading import load_model
from specserve.loading.quantization import check_quantization
from specserve.models.spec import ModelSpec
from specserve.runtime.model_state import Model, ModelState
from specserve.runtime.rows import DeviceRows
from specserve.runtime.runner import ModelRunner
from specserve.runtime.step_graphs import Sizes
from specserve.speculation.proposer import Proposer
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.host_adapter import round_up
from specserve_adapters.manager import AdapterManager
from specserve_kernels.lora.tiles import RANK_BLOCK

BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}  # of a step, where no setting says


@dataclass(frozen=True, slots=True)
class Resolved:
    """What EngineCore is made of, with every "auto" decided."""

    config: EngineConfig
    spec: ModelSpec
    runner: ModelRunner
    adapters: AdapterManager
    proposers: ProposerRegistry
    device: torch.device
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    pipeline_depth: int
    default_proposer: str | None


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


def build_engine(config: EngineConfig, extra_proposers: Sequence[Proposer] = (), *, progress: bool = False) -> Resolved:
    """Load the models and allocate everything, with progress bars on stderr if asked. Raises ModelLoadError or
    InvalidRequestError."""
    config.validate()
    config = resolve_paths(config)
    device = usable_device(config.device)
    batched_tokens = resolve_batched_tokens(config, device)
    check_quantization(config, device)
    with _room_for_weights(config.model, "quantization"):
        target = load_model(
            config.model, dtype=config.dtype, device=device, quantization=config.quantization,
            adapter_ranks=_adapter_ranks(config), progress=progress,
        )  # fmt: skip
    draft = _load_draft(config, target.spec, device, progress=progress)
    models: list[Model] = [target] if draft is None else [target, draft]
    max_model_len = resolve_max_model_len(config.max_model_len, [model.spec for model in models])
    proposers = ProposerRegistry(has_draft_model=draft is not None, extra=extra_proposers)
    adapters = _build_adapters(config, models)
    states = [_state(config, model, device) for model in models]
    rows = DeviceRows(
        config.max_num_seqs, max_model_len, slack=2 * (MAX_DRAFTS + 1), block_size=config.block_size,
        vocab_size=target.spec.vocab_size, max_adapters=config.max_adapters_per_request, device=device,
        dtype=torch.float64 if target.spec.dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    runner = ModelRunner(states[0], states[1] if draft else None, rows, proposers, adapters.host, device)
    num_blocks = allocate_kv_caches(config, runner, max_model_len, batched_tokens)
    if device.type == "cuda" and not config.enforce_eager and target.spec.dtype != torch.float64:
        runner.capture_graphs(
            Sizes(config.max_num_seqs, batched_tokens, max_model_len),
            drafts=default_proposer(config, proposers) is not None, with_adapters=config.max_loras > 0,
            progress=progress,
        )  # fmt: skip
    return Resolved(
        config=config, spec=target.spec, runner=runner, adapters=adapters, proposers=proposers, device=device,
        num_blocks=num_blocks, max_model_len=max_model_len, max_num_batched_tokens=batched_tokens,
        pipeline_depth=config.pipeline_depth or (1 if device.type == "cpu" else 2),
        default_proposer=default_proposer(config, proposers),
    )  # fmt: skip


def resolve_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a step: the setting, else what suits the device."""
    usual = BATCHED_TOKENS.get(device.type, BATCHED_TOKENS["cuda"])
    return config.max_num_batched_tokens or max(usual, config.max_num_seqs)


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
        raise InvalidRequestError(f"--proposer {proposers.unavailable(config.proposer)}", param="proposer")
    return config.proposer


def _load_draft(config: EngineConfig, target: ModelSpec, device: torch.device, *, progress: bool) -> Model | None:
    if config.draft_model is None:
        return None
    with _room_for_weights(config.draft_model, "draft_quantization"):
        draft = load_model(
            config.draft_model, dtype=dtype_name(target.dtype), device=device, quantization=config.draft_quantization,
            adapter_ranks=_adapter_ranks(config), progress=progress,
        )  # fmt: skip
    check_draft(target, draft.spec)
    return draft


def _room_for_weights(model: str, field: str) -> AbstractContextManager[None]:
    remedy = f"free some of the device's, or give --{field.replace('_', '-')} fp8 or int8"
    return room_for(f"the weights of {model}", remedy, field)


def _adapter_ranks(config: EngineConfig) -> int:
    """Ranks of all slots, as they lie on a device: see AdapterPool."""
    return config.max_loras * round_up(config.max_lora_rank, RANK_BLOCK)


def _build_adapters(config: EngineConfig, models: list[Model]) -> AdapterManager:
    specs = [[linear.spec for linear in model.linears] for model in models]
    manager = AdapterManager(
        specs[0], specs[1] if len(specs) > 1 else None, num_slots=config.max_loras, max_rank=config.max_lora_rank,
        max_host_bytes=host_lora_bytes(config), dtype=models[0].spec.dtype, draft_dtype=models[-1].spec.dtype,
        pin_memory=resolve_device(config.device).type == "cuda",
    )  # fmt: skip
    for name, path in config.loras:
        manager.register(name, path)
    return manager


def _state(config: EngineConfig, model: Model, device: torch.device) -> ModelState:
    slots = f"{config.max_loras} adapters of rank {config.max_lora_rank} at a time"
    with room_for(slots, "lower --max-loras or --max-lora-rank", "max_loras"):
        return ModelState(
            model, block_size=config.block_size, adapter_slots=config.max_loras, max_rank=config.max_lora_rank,
            device=device,
        )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> Dtype:
    """torch.float32 → "float32"."""
    name = str(dtype).removeprefix("torch.")
    assert name in ("float32", "bfloat16", "float16", "float64")
    return cast(Dtype, name)
