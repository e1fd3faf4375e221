"""EngineConfig: frozen, resolved once, printed once. CLI flags are its fields; the environment is read here only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

DEMO_ROOT = Path(__file__).parent / "demo"
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything EngineCore is built from. Sizes are in tokens or rows unless the name says bytes."""

    model: str = "demo"  # folder, hub id, or "demo": the bundled target with its draft and adapters
    draft_model: str | None = None
    num_draft_tokens: int | None = None  # None: auto
    speculation_method: Literal["auto", "rejection", "coupled"] = "auto"
    proposer: str | None = None  # default: draft_model where there is one, else none
    dtype: Dtype = "auto"
    device: str = "auto"
    seed: int | None = None  # of requests without their own; None: from the system's entropy
    block_size: int = 16
    num_blocks: int | None = None  # None: from gpu_memory_utilization (GPU) or kv_cache_bytes (CPU)
    kv_cache_bytes: int = 1 << 29  # on a CPU
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_waiting: int = 4096
    enable_prefix_caching: bool = True
    pipeline_depth: int | None = None  # None: 2 on a GPU, 1 on a CPU
    max_loras: int = 8  # device slots
    max_lora_rank: int = 64
    max_host_lora_bytes: int = 1 << 30
    max_adapters_per_request: int = 4
    loras: tuple[tuple[str, str], ...] = ()  # (name, path) registered at start
    check_integrity: bool = False  # after every step, in tests


def resolve_demo(config: EngineConfig) -> EngineConfig:
    """`model="demo"` means the bundled target; its draft and adapters come along unless others are named."""
    if config.model != "demo":
        return config
    adapters = sorted(path for path in (DEMO_ROOT / "adapters").glob("*") if path.is_dir())
    return msgspec.structs.replace(
        config,
        model=str(DEMO_ROOT / "target"),
        draft_model=config.draft_model or str(DEMO_ROOT / "draft"),
        loras=config.loras or tuple((path.name, str(path)) for path in adapters),
    )


def environment_api_key() -> str | None:
    """The API key where no flag gives one: an argument would show in the list of processes."""
    return os.environ.get("SPECSERVE_API_KEY") or None


def environment_seed() -> int:
    """A 63-bit seed from the system's entropy, for requests that bring none."""
    return int.from_bytes(os.urandom(8), "little") >> 1
