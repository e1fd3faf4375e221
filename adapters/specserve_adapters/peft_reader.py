"""PEFT LoRA folders → HostAdapter. The tensors are the truth; settings that disagree with them are an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from specserve.core.errors import AdapterError
from specserve_adapters.adapter_files import hash_folder, open_weights, read_config
from specserve_adapters.helpers import Helpers
from specserve_adapters.host_adapter import HostAdapter
from specserve_adapters.host_memory import HostMemory
from specserve_adapters.peft_config import PeftConfig, parse_config
from specserve_adapters.peft_weights import Factor, LoraModule, read_weights
from specserve_adapters.safetensors_file import StoredTensor, parse_header
from specserve_adapters.spec import LinearSpec, ModuleKey

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_OUTER = "LoRA on embeddings and on lm_head is not supported; train it without them in target_modules"
_WHOLE = "whole embeddings are no LoRA; if they were not trained, save the adapter with save_embedding_layers=False"
_UNSUPPORTED_TENSORS = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", _OUTER),
    # Beside such a LoRA, PEFT saves the layer that it is on.
    ("embed_tokens.base_layer", _OUTER),
    ("lm_head.base_layer", _OUTER),
    ("embed_tokens.weight", _WHOLE),
    ("lm_head.weight", _WHOLE),
    ("lora_B.bias", "a bias on lora_B is not supported"),
    ("lora_B.default.bias", "a bias on lora_B is not supported"),
    ("modules_to_save", "fully trained modules are not supported"),
    ("trainable_tokens", "trained token embeddings are not supported"),
    (".bias", "trained biases are not supported"),
)
Modules = Mapping[str, tuple[ModuleKey, int, int]]  # full module name → key, in_features, out_features


class ReadAdapter(NamedTuple):
    """An adapter, and what its folder adds to a version (`adapter_files.version_of`)."""

    adapter: HostAdapter
    contents: bytes


def read_adapter(
    path: Path,
    specs: Sequence[LinearSpec],
    *,
    max_rank: int,
    dtype: torch.dtype,
    memory: HostMemory | None = None,
    helpers: Helpers = None,
    max_file_bytes: int | None = None,
    max_bytes: int | None = None,
) -> ReadAdapter:
    """Read and validate the PEFT folder `path` for the model whose linears are `specs`.

    Raises AdapterError that names the file, setting or tensor. `dtype` is what the factors are converted to; `memory`
    is where the adapter comes to lie (None: in memory of its own), `helpers` share the work; the limits are the file's
    and the adapter's.
    """
    data = read_config(path)
    config = parse_config(data)
    with open_weights(path, max_bytes=max_file_bytes) as weights:
        modules = _plan(config, _modules(specs), parse_header(weights.header, weights.num_bytes), max_rank)
        _check_size(modules, dtype, max_bytes)
        adapter, hashes = read_weights(weights, specs, modules, dtype, memory or HostMemory(0, pin=False), helpers)
        return ReadAdapter(adapter, hash_folder(data, weights.header, hashes))


def _plan(config: PeftConfig, modules: Modules, tensors: Mapping[str, StoredTensor], max_rank: int) -> list[LoraModule]:
    """The modules that carry a LoRA, in the model's order, all of it checked but the values."""
    planned: list[LoraModule] = []
    pairs = _pair_tensors(tensors, modules)
    _check_targets(config, modules, pairs)
    for module, (a, b) in pairs.items():
        key, in_features, out_features = modules[module]
        rank = config.rank(module)
        if rank > max_rank:
            raise AdapterError(
                f"{module} has rank {rank}; the largest that is served here is {max_rank}: start with "
                f"--max-lora-rank {rank} to serve it."
            )
        a_name, b_name = _tensor_name(module, "A"), _tensor_name(module, "B")
        _check_tensor(a_name, a, (rank, in_features))
        _check_tensor(b_name, b, (out_features, rank))
        planned.append(LoraModule(key, Factor(a_name, a), Factor(b_name, b), config.scaling(module)))
    return planned


def _modules(specs: Iterable[LinearSpec]) -> Modules:
    modules: dict[str, tuple[ModuleKey, int, int]] = {}
    for spec in specs:
        for key, (name, out_features) in zip(spec.keys, spec.parts, strict=True):
            modules[f"model.layers.{spec.layer}.{name}"] = (key, spec.in_features, out_features)
    return modules


def _pair_tensors(
    tensors: Mapping[str, StoredTensor], modules: Modules
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """{full module name: (A, B)} in the model's order. Raises AdapterError for anything else in the file."""
    found: dict[tuple[str, str], StoredTensor] = {}
    for name, tensor in sorted(tensors.items()):  # the first fault is always the same
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            reason = next((why for part, why in _UNSUPPORTED_TENSORS if part in name), "it is not part of a LoRA")
            raise AdapterError(f"Tensor {name}: {reason}.")
        module, side = match["module"], match["side"]
        if module not in modules:
            outer = module.rpartition(".")[2] in ("embed_tokens", "lm_head")
            reason = _OUTER if outer else "the model has no such linear"
            raise AdapterError(f"Tensor {name}: {reason}.")
        if (module, side) in found:
            raise AdapterError(f"Tensor {name}: lora_{side} of {module} is there twice.")
        found[module, side] = tensor
    pairs: dict[str, tuple[StoredTensor, StoredTensor]] = {}
    for module in modules:
        a, b = found.get((module, "A")), found.get((module, "B"))
        if a is not None and b is not None:
            pairs[module] = (a, b)
        elif a is not None or b is not None:
            missing, other = ("B", "A") if b is None else ("A", "B")
            raise AdapterError(f"Tensor {_tensor_name(module, missing)} is missing; its lora_{other} is there.")
    if not pairs:
        raise AdapterError("adapter_model.safetensors holds no LoRA tensors.")
    return pairs


def _check_targets(config: PeftConfig, modules: Modules, tensors: Mapping[str, object]) -> None:
    if config.target_modules is None:
        return
    for outer in ("model.embed_tokens", "lm_head"):
        if config.targets(outer):
            raise AdapterError(f"adapter_config.json: target_modules names {outer}, which cannot carry a LoRA here.")
    for module in modules:
        if config.targets(module) and module not in tensors:
            raise AdapterError(f"adapter_config.json targets {module}, but the weights hold no LoRA for it.")
        if module in tensors and not config.targets(module):
            raise AdapterError(f"The weights hold a LoRA for {module}, which adapter_config.json does not target.")


def _check_size(modules: Sequence[LoraModule], dtype: torch.dtype, max_bytes: int | None) -> None:
    """Before any memory is taken."""
    size = dtype.itemsize * sum(module.a.numel + module.b.numel for module in modules)
    if max_bytes is not None and size > max_bytes:
        raise AdapterError(
            f"It needs {size} bytes of host memory; adapters may take {max_bytes}: start with a larger "
            "--max-host-lora-bytes."
        )


def _check_tensor(name: str, tensor: StoredTensor, expected: tuple[int, int]) -> None:
    if tensor.dtype not in _FLOATS:
        raise AdapterError(f"Tensor {name} is {tensor.dtype_name}; float16, bfloat16, float32 or float64 expected.")
    if tensor.shape != expected:
        raise AdapterError(f"Tensor {name} should have the shape {list(expected)}, but has {list(tensor.shape)}.")


def _tensor_name(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"
