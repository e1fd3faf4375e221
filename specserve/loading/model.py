"""From a name or folder to a model that can run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from specserve.config import AutoQuantization, Dtype
from specserve.core.errors import ModelLoadError
from specserve.loading.checkpoint import fill
from specserve.loading.progress import progress_bar
from specserve.loading.quantization import resolve_quantization
from specserve.loading.source import resolve_folder
from specserve.models.decoder import Decoder
from specserve.models.registry import build_model

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_model(
    name_or_path: str,
    *,
    dtype: Dtype = "auto",
    device: torch.device | str = "cpu",
    quantization: AutoQuantization = "none",
    adapter_ranks: int = 0,
    progress: bool = False,
) -> Decoder:
    """Load a model from a local folder or a hub id onto `device`; `progress` shows it on stderr.

    `dtype` "auto": the config's on an accelerator, float32 on a CPU. `quantization`: of the linears and the head, while
    they are loaded; "auto": what makes decoding fastest here, see loading.quantization. `adapter_ranks` of all adapter
    slots together: linears may keep room for them. Raises ModelLoadError, in one
    sentence that names the file, tensor or setting, when the model cannot be read or is not supported.
    """
    place = torch.device(device)
    folder = resolve_folder(name_or_path)
    config = read_config(folder)
    kind = resolve_dtype(dtype, config, place)
    model = build_model(
        config, dtype=kind, device=place, eos_token_ids=read_eos(folder, config),
        quantization=resolve_quantization(quantization, config, kind, place), adapter_ranks=adapter_ranks,
    )  # fmt: skip
    total = sum(parameter.nbytes for parameter in model.parameters.values())
    with progress_bar(
        f"Loading weights of {Path(name_or_path).name or name_or_path}", total, shown=progress
    ) as advance:
        fill(model.parameters, folder, ignored=model.ignored, advance=advance)
    return model


def read_config(folder: Path) -> Any:
    """The folder's transformers config; code in the folder is never run."""
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json.")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its validators raise types of their own; a config of whatever fault is the user's
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"{folder / 'config.json'} cannot be read: {reason}") from error


def resolve_dtype(dtype: Dtype, config: Any, device: torch.device) -> torch.dtype:
    """The dtype to compute in."""
    if dtype != "auto":
        return DTYPES[dtype]
    declared = getattr(config, "dtype", None)
    if device.type == "cpu" or declared is None:
        return torch.float32
    chosen = DTYPES.get(str(declared).removeprefix("torch."))
    if chosen is None:
        raise ModelLoadError(f"The config's dtype {declared} is not supported; choose one with --dtype.")
    return chosen


def read_eos(folder: Path, config: Any) -> tuple[int, ...]:
    """Token ids that end a text: generation_config.json's, else the config's; may be empty."""
    declared = getattr(config, "eos_token_id", None)
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
            declared = generation.get("eos_token_id", declared)
        except (OSError, ValueError, AttributeError) as error:
            raise ModelLoadError(f"{path} is not a JSON object.") from error
    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list | tuple) else (declared,)
