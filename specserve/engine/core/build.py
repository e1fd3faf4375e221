"""From an EngineConfig to models, caches and a runner: everything that is decided once at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from specserve.config import DEMO_ROOT, EngineConfig
from specserve.core.errors import InvalidRequestError, ModelLoadError
from specserve.device import free_memory, resolve_device
from specserve.loading import load_model
from specserve.models.spec import ModelSpec
from specserve.runtime.model_state import Model, ModelState, kv_bytes_per_block
from specserve.runtime.rows import DeviceRows
from specserve.runtime.runner import ModelRunner
from specserve.speculation.registry import ProposerRegistry
from specserve_adapters.manager import AdapterManager

MAX_DRAFTS = 64
AUTO_DRAFTS = 4


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
    default_drafts: int


def demo_config(config: EngineConfig) -> EngineConfig:
    """`model="demo"` means the bundled target; its draft and adapters come along unless others are named."""
    if config.model != "demo":
        return config
    from msgspec.structs import replace  # noqa: PLC0415

    adapters = sorted(path for path in (DEMO_ROOT / "adapters").iterdir() if path.is_dir())
    return replace(
        config,
        model=str(DEMO_ROOT / "target"),
        draft_model=config.draft_model or str(DEMO_ROOT / "draft"),
        loras=config.loras or tuple((path.name, str(path)) for path in adapters),
    )


def check_draft(target: ModelSpec, draft: ModelSpec) -> None:
    """Hidden sizes may differ; vocabularies may not."""
    if target.vocab_size != draft.vocab_size:
        raise ModelLoadError(
            f"The draft model's vocabulary has {draft.vocab_size} tokens, the target's {target.vocab_size}: "
            "speculation needs a draft model with the same tokenizer."
        )
