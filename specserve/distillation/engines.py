"""Where and in what precision everything runs, and engines that give their memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from specserve.config import EngineConfig
from specserve.device import resolve_device
from specserve.distillation.settings import DistillSettings, Job
from specserve.llm import LLM
from specserve_adapters.adapter_files import read_config
from specserve_adapters.peft_config import parse_config


def device_of(settings: DistillSettings) -> torch.device:
    """Where everything is computed."""
    return resolve_device(settings.device)


def dtype_of(settings: DistillSettings) -> torch.dtype:
    """Of weights; a LoRA that is trained has float32 weights in either case."""
    if settings.dtype == "auto":
        return torch.bfloat16 if device_of(settings).type == "cuda" else torch.float32
    return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32


MAX_NUM_SEQS = 64  # more would mean more graphs to capture, which takes longer than a few hundred texts


@contextmanager
def engine(job: Job, draft_model: str | None, adapters: dict[str, Path]) -> Iterator[LLM]:
    """An engine with these adapters, whose memory is free again afterwards. Raises what `LLM` raises."""
    folders = [folder for path in adapters.values() for folder in (path, path / "draft") if folder.is_dir()]
    config = EngineConfig(
        model=job.model, draft_model=draft_model, device=job.settings.device,
        dtype="bfloat16" if dtype_of(job.settings) is torch.bfloat16 else "float32",
        loras=tuple((name, str(path)) for name, path in adapters.items()),
        max_num_seqs=MAX_NUM_SEQS, max_lora_rank=max(_rank(folder) for folder in folders),
    )  # fmt: skip
    llm = LLM(config)
    try:
        yield llm
    finally:
        llm.close()
        del llm
        release_memory()


def release_memory() -> None:
    """What nobody refers to any more goes back to the device, for whoever comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rank(folder: Path) -> int:
    config = parse_config(read_config(folder))
    return max(config.r, *(config.rank_pattern or {"": 1}).values())
