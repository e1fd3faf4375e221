"""EngineConfig: frozen, resolved once, printed once. CLI flags are its fields; the environment is read here only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from specserve.core.errors import InvalidRequestError

DEMO_ROOT = Path(__file__).parent / "demo"
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Quantization = Literal["none", "fp8", "int8"]
AutoQuantization = Literal["auto", "fp8", "int8", "none"]
MAX_DRAFTS = 64  # a step and request
MAX_DEPTH = 2  # steps in flight
MAX_BLOCK_SIZE = 1024
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything EngineCore is built from. Sizes are in tokens or rows unless the name says bytes."""

    model: str = "demo"  # folder, hub id, or "demo": the bundled target with its draft and adapters
    draft_model: str | None = None
    num_draft_tokens: int | None = None  # None: auto
    speculation_method: Literal["auto", "rejection", "coupled"] = "auto"
    proposer: str | None = None  # one name or "first+second"; default: draft_model where there is one, else none
    dtype: Dtype = "auto"
    quantization: Quantization = "none"  # of the model's weights, while they are loaded
    draft_quantization: AutoQuantization = "auto"  # of the draft model's
    device: str = "auto"
    seed: int | None = None  # of requests without their own; None: from the system's entropy
    block_size: int = 16
    num_blocks: int | None = None  # None: from gpu_memory_utilization (GPU) or kv_cache_bytes (CPU)
    kv_cache_bytes: int = 1 << 29  # on a CPU
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: 8192 on a GPU, 2048 on a CPU
    max_waiting: int = 4096
    enable_prefix_caching: bool = True
    pipeline_depth: int | None = None  # None: 2 on a GPU, 1 on a CPU
    enforce_eager: bool = False  # no CUDA graphs
    max_loras: int = 8  # device slots
    max_lora_rank: int = 64
    max_host_lora_bytes: int | None = None  # None: 4 GiB, or a quarter of the machine's memory where that is less
    max_adapters_per_request: int = 4
    loras: tuple[tuple[str, str], ...] = ()  # (name, path) registered at start
    lora_dirs: tuple[str, ...] = ()  # each subfolder of these is registered too, under its own name
    check_integrity: bool = False  # after every step, in tests

    def validate(self) -> None:
        """Raise InvalidRequestError naming the first flag that is of the wrong type or out of range."""
        _check_types(self)
        for field, low, high in (
            ("num_draft_tokens", 0, MAX_DRAFTS),
            ("seed", -(2**63), 2**63 - 1),
            ("block_size", 1, MAX_BLOCK_SIZE),
            ("num_blocks", 2, None),
            ("kv_cache_bytes", 1, None),
            ("max_model_len", 2, None),
            ("max_num_seqs", 1, None),
            ("max_num_batched_tokens", 1, None),
            ("max_waiting", 0, None),
            ("pipeline_depth", 1, MAX_DEPTH),
            ("max_loras", 0, None),
            ("max_lora_rank", 1, None),
            ("max_host_lora_bytes", 0, None),
            ("max_adapters_per_request", 1, None),
        ):
            value = getattr(self, field)
            if value is not None and (value < low or (high is not None and value > high)):
                want = f"at least {low}" if high is None else f"between {low} and {high}"
                raise _refused(field, f"must be {want}, got {value}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise _refused("gpu_memory_utilization", f"must be in (0, 1], got {self.gpu_memory_utilization}.")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise _refused(
                "max_num_batched_tokens",
                f"({self.max_num_batched_tokens}) must not be below --max-num-seqs ({self.max_num_seqs}): every "
                "running sequence takes at least one token a step.",
            )


def _check_types(config: EngineConfig) -> None:
    """msgspec checks types where it decodes, not where Python constructs."""
    try:
        msgspec.convert(msgspec.structs.asdict(config), EngineConfig)
    except msgspec.ValidationError as error:
        found = re.search(r"`\$\.(\w+)", str(error))
        assert found is not None, error
        raise _refused(found[1], f"is {getattr(config, found[1])!r}: {str(error).split(' - at ')[0]}.") from error


def _refused(field: str, reason: str) -> InvalidRequestError:
    flag = {"loras": "--lora", "lora_dirs": "--lora-dir"}.get(field, "--" + field.replace("_", "-"))
    return InvalidRequestError(f"{flag} {reason}", param=field)


def resolve_paths(config: EngineConfig) -> EngineConfig:
    """Every folder by its path: `lora_dirs` become `loras`; `model="demo"` means the bundled target, whose draft and
    adapters come along unless others are named. What is resolved already stays as it is.

    Raises InvalidRequestError for a folder of adapters that is none.
    """
    config = _resolve_lora_dirs(config)
    if config.model != "demo":
        return config
    adapters = sorted(path for path in (DEMO_ROOT / "adapters").glob("*") if path.is_dir())
    return msgspec.structs.replace(
        config,
        model=str(DEMO_ROOT / "target"),
        draft_model=config.draft_model or str(DEMO_ROOT / "draft"),
        loras=config.loras or tuple((path.name, str(path)) for path in adapters),
    )


def _resolve_lora_dirs(config: EngineConfig) -> EngineConfig:
    loras, paths = list(config.loras), dict(config.loras)
    for name, path in (found for folder in config.lora_dirs for found in adapters_in(folder)):
        if name in paths:
            raise _refused("lora_dirs", f"names the adapter {name!r} twice: {paths[name]} and {path}.")
        paths[name] = path
        loras.append((name, path))
    return msgspec.structs.replace(config, loras=tuple(loras), lora_dirs=())


def adapters_in(folder: str) -> list[tuple[str, str]]:
    """(name, path) of the subfolders that are not hidden, by name; each must hold an adapter's two files.

    Nothing is read: a thousand of them take some ten milliseconds. Raises InvalidRequestError naming those that hold no
    adapter.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((item.name, item.path) for item in entries if item.name[0] != "." and item.is_dir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(f"The folder {folder!r} cannot be listed: {reason}.", param="lora_dirs") from error
    if missing_file(folder) is None:
        raise InvalidRequestError(
            f"{folder!r} is itself an adapter, not a folder of adapters: name it as NAME=PATH.", param="lora_dirs"
        )
    bad = [name for name, path in found if missing_file(path) is not None]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InvalidRequestError(
            f"Every subfolder of {folder!r} must hold {' and '.join(ADAPTER_FILES)}; these do not: "
            f"{', '.join(bad[:5])}{more}. Move them away, or name adapters one by one as NAME=PATH.",
            param="lora_dirs",
        )
    return found


def missing_file(folder: str) -> str | None:
    """The first file that an adapter's folder lacks."""
    return next((file for file in ADAPTER_FILES if not os.path.isfile(os.path.join(folder, file))), None)


def host_lora_bytes(config: EngineConfig) -> int:
    """Memory for adapters in the host tier. What has a device slot is there too, so it bounds the slots in use."""
    if config.max_host_lora_bytes is not None:
        return config.max_host_lora_bytes
    return min(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def environment_api_key() -> str | None:
    """The API key where no flag gives one: an argument would show in the list of processes."""
    return os.environ.get("SPECSERVE_API_KEY") or None


def environment_threads() -> str | None:
    """OMP_NUM_THREADS: whoever sets it has chosen the number of threads."""
    return os.environ.get("OMP_NUM_THREADS") or None


def environment_seed() -> int:
    """A 63-bit seed from the system's entropy, for requests that bring none."""
    return int.from_bytes(os.urandom(8), "little") >> 1
